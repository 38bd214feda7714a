"""From raw text to training batches.

corpus        JSONL out of the documentation and sources of the running Python
documents     read JSONL documents, naming file and line of whatever is wrong
tokenizer     train and load SentencePiece tokenizers
shards        write and check token shards in megatron-core's IndexedDataset format, and their manifest
preprocess    JSONL to token shards, with several processes
config        the `data` section of a run's configuration
shard_index   the checked shards of a source, found once and kept in a file
sources       the sources of a run: shards, shares, held-out parts, and their content's hash
token_stream  one part of a source as a single run of tokens, across its shards
order         which sample comes when, as a function of its number: blends and shuffles
dataset       training and validation samples by number
loader        micro-batches in a global sample order
shared        the same sources on every rank
stored_text   tokenised documents as text again
baselines     unigram and bigram losses to compare a run with
"""
