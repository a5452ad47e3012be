"""Images: protobuf messages, one .proto per kind of state, their codec and `show`; see FORMAT.md."""
