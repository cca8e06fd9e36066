"""Empty. PEFT puts LoRA on a layer of GPTQModel only where it finds a module of this name, and imports nothing of it.
"""
