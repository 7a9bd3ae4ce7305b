"""Which logical axes to shard, and where to communicate: from an analysis to a :class:`Plan`."""
