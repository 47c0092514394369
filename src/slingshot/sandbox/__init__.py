"""Other people's code in processes of its own: an emptied environment, bounded time and memory."""
