"""Example inputs are found or asked for; scenarios run other code each; errors say where and what to do."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

from autotp.errors import TraceError
from autotp.trace.capture import trace
from autotp.trace.inputs import as_arguments, example_inputs
from autotp.trace.leaves import tensor_leaves
from autotp.trace.media import media_inputs
from autotp.trace.replay import replay, state_of
from autotp.trace.scenario import scenarios, trace_model
from autotp.trace.skeleton import skeleton
from benchmarks.zoo.configs import architectures
from benchmarks.zoo.configs import build as tiny
from tests.models import MODELS


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    args, kwargs = example_inputs(model)
    return {".".join(map(str, path)): tuple(t.shape) for path, t in tensor_leaves((args, kwargs), ())}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"1.input_ids": (2, 7)}),
        ("bert", {"1.input_ids": (2, 7)}),
        ("t5", {"1.input_ids": (2, 7), "1.decoder_input_ids": (2, 5)}),
        ("vit", {"1.pixel_values": (2, 3, 12, 12)}),
        ("mlp", {"0.0": (2, 7, 28)}),
        ("nanogpt", {"0.0": (2, 7)}),
        ("torch_encoder", {"0.0": (2, 7, 40)}),
        ("transformer_layer", {"0.0": (2, 7, 40)}),
    ],
)
def test_found_from_the_model(name: str, expected: dict[str, tuple[int, ...]]) -> None:
    model = MODELS[name].build()
    assert shapes(model) == expected
    args, kwargs = example_inputs(model)
    model(*args, **kwargs)


def test_speech_and_two_towers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    whisper = transformers.WhisperConfig(
        vocab_size=31, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, max_source_positions=11, num_mel_bins=16, pad_token_id=0,
    )  # fmt: skip
    wave = transformers.Wav2Vec2Config(
        **sizes, conv_dim=[8, 8], conv_stride=[5, 2], conv_kernel=[10, 3], num_conv_pos_embedding_groups=2
    )
    clip = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 31, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 12, "patch_size": 4},
    )
    with torch.device("meta"):
        assert shapes(transformers.WhisperForConditionalGeneration(whisper)) == {
            "1.input_features": (2, 16, 22),
            "1.decoder_input_ids": (2, 5),
        }
        assert shapes(transformers.Wav2Vec2Model(wave)) == {"1.input_values": (2, 160)}
        assert shapes(transformers.CLIPModel(clip)) == {
            "1.input_ids": (2, 7),
            "1.pixel_values": (2, 3, 12, 12),
        }


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.lin(x) * mask


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Two(), r"cannot guess example inputs for Two: .* takes \(x, mask\).*example_inputs=\(x, mask\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"images of 3 channels.*torch.zeros\(2, 3, HEIGHT, WIDTH\)"),
        (nn.Sequential(nn.Conv1d(3, 4, 3)), r"cannot guess .* takes \(input\)"),
    ],
)
def test_asked_for(model: nn.Module, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        example_inputs(model)


def test_a_parameter_of_the_root_is_no_hint() -> None:
    assert shapes(nn.Sequential(nn.LayerNorm(6))) == {"0.0": (2, 7, 6)}
    with pytest.raises(TraceError, match="cannot guess"):
        example_inputs(Bare())


def test_given() -> None:
    x = torch.zeros(2)
    assert as_arguments((x,)) == ((x,), {})
    assert as_arguments({"x": x}) == ((), {"x": x})
    assert as_arguments(x)[0][0] is x
    with pytest.raises(TraceError, match="example_inputs is a int"):
        as_arguments(3)  # type: ignore[arg-type]


# scenarios


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.lin(x), 0.1, self.training)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (MODELS["mlp"].build(), "forward"),
        (MODELS["transformer_layer"].build(), "forward train"),
        (MODELS["transformer_layer"].build(dropout=0.0), "forward"),
        (Literal(), "forward train"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(7)), "forward train"),
        (MODELS["llama"].build(), "forward decode"),
        (MODELS["gpt2"].build(), "forward train decode"),
        (MODELS["bert"].build(), "forward train"),
        (MODELS["vit"].build(), "forward"),
    ],
)
def test_which_scenarios(model: nn.Module, names: str) -> None:
    assert [scenario.name for scenario in scenarios(model)] == names.split()


def test_train_mode_is_traced_and_left() -> None:
    model = Literal()
    bare = skeleton(model)
    trains = trace(bare, (torch.zeros(2, 4),), scenario="train")
    evals = trace(bare, (torch.zeros(2, 4),))
    assert any("dropout" in n.name for n in trains.graph.nodes)
    assert not any("dropout" in n.name for n in evals.graph.nodes)
    assert bare.training


@pytest.mark.parametrize("name", ["llama", "bloom", "t5"])
def test_decoding_replays(name: str) -> None:
    model = MODELS[name].build()
    found = {t.scenario: t for t in trace_model(model, scenarios(model))[0]}["decode"]
    scenario = next(s for s in scenarios(model) if s.name == "decode")
    expected = scenario.run(model, **scenario.kwargs)
    outputs = replay(found, state_of(model, found), (), scenario.kwargs)
    assert expected[1].shape[1] == 1
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert [c.index for c in found.calls if c.fqn == ""] == ([0, 1])


# errors


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(4, 4), Inner())

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gate
        return x[x.nonzero()[:, 0]]


class Devices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(4, device="meta")


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (Branches(), ["'gate.1'", "test_inputs.py:", "'x.sum() > 0'", "depends on values", "torch.where"]),
        (Loops(), ["test_inputs.py:", "'x.nonzero()'", "depends on values", "batched_mm"]),
        (Devices(), ["test_inputs.py:", "two devices", "device=x.device"]),
        (nn.Linear(5, 5), ["forward raised RuntimeError", "example_inputs"]),
    ],
)
def test_errors_say_where_and_what_to_do(model: nn.Module, parts: list[str]) -> None:
    bare = skeleton(model)
    with pytest.raises(TraceError) as error:
        trace(bare, (torch.zeros(2, 4),))
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "'forward'" in str(error.value)
    assert not [n for m in bare.modules() for n in vars(m) if n == "__call__"]


class Known(nn.Module):
    """Branches on values that are known: literals, ranges, an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        if positions.max() > 1 and bool((self.order == 2).any()):
            x = x[:, self.order[:2].tolist()]
        return self.lin(x)[..., [-2]]


def test_known_values_are_followed() -> None:
    model = Known()
    found = trace(skeleton(model), (torch.zeros(2, 3, 4),))
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(replay(found, state_of(model, found), (x,))[0], model(x))
    index = next(n for n in reversed(found.graph.nodes) if n.name.startswith("index"))
    picked = [found.constants[n].tolist() for n in index.all_input_nodes if n in found.constants]
    assert picked == [[-2]]


# images, audio, pages


def sees(**changes: object) -> nn.Module:
    """A language model that sees: CLIP's tower and Llama, an image of 3 x 3 patches."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 12}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **sizes, "vocab_size": 31, "num_key_value_heads": 2},
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 12, "patch_size": 4},
        **{"image_token_index": 29, "vision_feature_layer": -1, **changes},
    )
    return transformers.LlavaForConditionalGeneration(config).double().eval()


def test_an_image_and_its_tokens() -> None:
    model = sees()
    forward = scenarios(model)[0]
    found = forward.kwargs
    assert found["pixel_values"].shape == (2, 3, 12, 12)
    assert found["input_ids"].shape == (2, 9 + 7)
    assert found["input_ids"][0].eq(29).sum() == 9
    model(**found)
    used = {n for n, node in trace_model(model, [forward])[0][0].params.items() if node.users}
    assert "model.vision_tower.encoder.layers.0.mlp.fc1.weight" in used


def test_no_image_where_there_is_no_token_for_it() -> None:
    model = sees(image_token_index=31)  # beyond the vocabulary
    assert "pixel_values" not in scenarios(model)[0].kwargs
    assert list(media_inputs(MODELS["llama"].build())) == []


def test_the_checks_of_values_are_back_after_a_trace() -> None:
    transformers_checks = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    model = sees()
    assert transformers_checks not in os.environ
    found = scenarios(model)[0].kwargs
    assert transformers_checks not in os.environ
    with pytest.raises(ValueError, match="do not match"):
        model(**{**found, "input_ids": found["input_ids"][:, 5:]})


def test_several_kinds_of_inputs() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 12}
    layers = {"num_layers": 1, "num_heads": 2, "d_model": 8, "d_ff": 12, "d_kv": 4, "vocab_size": 31}
    conv = {"conv_dim": [8], "conv_stride": [5], "conv_kernel": [10], "num_conv_pos_embedding_groups": 2}
    wave = transformers.Wav2Vec2Config(**sizes, **conv)
    with torch.device("meta"):
        stacked = transformers.Wav2Vec2BertConfig(**sizes, feature_projection_input_dim=20)
        assert shapes(transformers.Wav2Vec2BertModel(stacked)) == {"1.input_features": (2, 29, 20)}
        listed = transformers.Siglip2Config(
            text_config={**sizes, "vocab_size": 31},
            vision_config={**sizes, "patch_size": 4, "num_patches": 16},
        )
        assert shapes(transformers.Siglip2Model(listed)) == {
            "1.input_ids": (2, 7),
            "1.pixel_values": (2, 15, 48),
            "1.pixel_attention_mask": (2, 15),
            "1.spatial_shapes": (2, 2),
        }
        page = transformers.LayoutLMConfig(**sizes, vocab_size=31)
        assert shapes(transformers.LayoutLMModel(page)) == {"1.input_ids": (2, 7), "1.bbox": (2, 7, 4)}
        patches = transformers.Pix2StructConfig(
            text_config={**layers, "hidden_size": 8}, vision_config={**sizes, "patch_size": 4, "d_ff": 12}
        )
        found = shapes(transformers.Pix2StructForConditionalGeneration(patches))
        assert found["1.flattened_patches"] == (2, 15, 2 + 48)
        music = transformers.MusicgenDecoderConfig(
            vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=12, num_codebooks=3
        )
        assert shapes(transformers.MusicgenForCausalLM(music)) == {"1.input_ids": (6, 7)}
        pair = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
            wave, transformers.BertConfig(**sizes, vocab_size=31)
        )
        assert shapes(transformers.SpeechEncoderDecoderModel(pair)) == {
            "1.inputs": (2, 80),
            "1.decoder_input_ids": (2, 5),
        }


def test_images_beside_text() -> None:
    """Patches told by a grid, several images of which padding is left out, and tiles of one image."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", **sizes, "vocab_size": 31}
    tower = {**sizes, "image_size": 12, "patch_size": 4}
    with torch.device("meta"):
        several = transformers.Idefics3ForConditionalGeneration(
            transformers.Idefics3Config(text_config=text, vision_config=tower, image_token_id=30, scale_factor=1)
        )
        tiles = transformers.LlavaNextForConditionalGeneration(
            transformers.LlavaNextConfig(
                text_config=text,
                vision_config={"model_type": "clip_vision_model", **tower},
                image_token_index=30,
                vision_feature_layer=-1,
                image_grid_pinpoints=[[12, 24], [24, 12]],
            )
        )
    assert scenarios(several)[0].kwargs["pixel_values"].shape == (2, 1, 3, 12, 12)
    given = scenarios(tiles)[0].kwargs
    assert given["pixel_values"].shape == (2, 3, 3, 12, 12)  # two tiles, and the image
    assert (given["input_ids"] == 30).sum(1).tolist() == [24] * 2


def test_a_decoder_by_itself_is_traced_with_states_to_look_at_and_without() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"decoder_layers": 1, "decoder_attention_heads": 2, "d_model": 8, "decoder_ffn_dim": 12, "vocab_size": 31}
    with torch.device("meta"):
        model = transformers.BartForCausalLM(transformers.BartConfig(**sizes))
    first, *others = scenarios(model)
    assert first.kwargs["encoder_hidden_states"].shape[-1] == 8
    alone = next(scenario for scenario in others if scenario.name == "alone")
    assert alone.kwargs.keys() == first.kwargs.keys() - {"encoder_hidden_states"}


@pytest.mark.parametrize(
    ("name", "sound", "expected"),
    [
        # masks tell of the features, not of the frames that those are made of
        ("granite_speech", "input_features", {"input_features": (2, 96, 160), "input_features_mask": (2, 21)}),
        # the getter that the outermost module has only passes on what it knows by name
        ("moss_transcribe_diarize", "input_features", {"input_features": (2, 80, 3000), "padding_mask": (2, 3000)}),
        # features are placed by where the tokens for them are
        ("musicflamingo", "input_features", {"input_features": (2, 128, 3000), "input_ids": (2, 757)}),
        # samples, not frames
        ("vibevoice_asr", "input_values", {"input_values": (2, 1, 24), "input_ids": (2, 10)}),
    ],
)
def test_sounds_beside_text(name: str, sound: str, expected: dict[str, tuple[int, ...]]) -> None:
    _, given = tiny(name, dict(architectures("seq2seq"))[name], {})
    assert {key: tuple(given[key].shape) for key in expected} == expected
    tokens = int((given["input_ids"] == 96).sum())
    assert tokens == 2 * (given["input_ids"].shape[1] - 7) and given[sound].abs().min() >= 0
