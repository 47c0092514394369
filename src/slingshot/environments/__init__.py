"""What a model may call: tools, and the worker that holds them. No torch."""
