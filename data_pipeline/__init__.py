"""From raw text to training batches.

corpus        JSONL out of the documentation and sources of the running Python
documents     read JSONL documents, naming file and line of whatever is wrong
tokenizer     train and load SentencePiece tokenizers
shards        write and check token shards in megatron-core's IndexedDataset format, and their manifest
preprocess    JSONL to token shards, with several processes
config        the `data` section of a run's configuration
sources       the checked shards behind that section, and their held-out parts
dataset       training and validation samples, through megatron-core's GPTDataset
stored_text   tokenised documents as text again
loader        micro-batches in a global sample order
checks        token ids against the model's vocabulary, before a run starts
baselines     unigram and bigram losses to compare a run with
"""
