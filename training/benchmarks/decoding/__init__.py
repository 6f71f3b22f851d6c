"""Engines that decode token by token, measured in turn by `decode_speed`: torch, and llama.cpp."""
