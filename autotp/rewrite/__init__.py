"""From a choice of axes to edits of the user's model, and the proof that the edited model computes what was planned."""
