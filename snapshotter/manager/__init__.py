"""The manager: joins the engine to the store. One module per thing a user does; the CLI is thin above it."""
