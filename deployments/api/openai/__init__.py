"""OpenAI's Images API, so that its clients reach the same models: generations, edits, and both as streams."""
