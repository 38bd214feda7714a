"""Text from a model: `sambalm generate`.

source.py     a model and its tokenizer, from a Hugging Face folder, a checkpoint or a run
text.py       tokens to text, exactly and as they come; strings that end a text
sampling.py   logits to the next tokens
rows.py       texts that are generated together
output.py     what is printed of them
command.py    prompts to output; chat.py the same in turns
"""
