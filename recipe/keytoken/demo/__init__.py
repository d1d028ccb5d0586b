"""The demo world: rendered clips, questions, a tiny Qwen2.5-VL, and its supervised warm start."""
