"""From raw text to training batches.

corpus        JSONL out of the documentation and sources of the running Python
inputs        input files, here or in an object store: listed in order, read in ranges or decompressed
documents     documents out of them, in pieces, naming file and line of whatever is wrong
tokenizer     what tokenizers do. tokenizer_formats: SentencePiece's, Hugging Face's and tiktoken's, and loading one by
              its file's name; tokenizer_training: training a SentencePiece one
encoding      documents to ids, fast where that is proven to change nothing
parts         shares of the input for several machines
shards        write and check token shards in megatron-core's IndexedDataset format, and their manifest
loss_mask     which tokens count in the loss, beside the shards
shard_sequence   token batches packed into shards, each committed when it is full
progress      the log of committed shards, from which a run goes on
output        what lies under a prefix, and the manifest over all parts
chat          conversations to ids by a chat template, and what the assistant says
made_documents  passkeys and phone books, made from a seed
workers       processes that tokenise, and their batches in the order of the input
interrupts    child processes that do not hear Ctrl-C
shuffle       documents in an order drawn from a seed, in bounded memory
preprocess    text to token shards: read this first
datatrove     the same encoder and shards as steps of datatrove's pipelines, where that is installed
recipes       whole such pipelines: web takes raw text through filters and deduplication to shards
verify        every byte against the manifest
inspection    statistics, documents and samples for people to read
blend         what a blend of sources will draw
config        the `data` section of a run's configuration
shard_index   the checked shards of a source, found once and kept in a file
sources       the sources of a run: shards, shares, held-out parts, and their content's hash
token_stream  one part of a source as a single run of tokens, across its shards
order         which sample comes when, as a function of its number: blends and shuffles
packing       samples of whole documents
dataset       training and validation samples by number
phases        the data sets of a run's phases, each behind what those before it have drawn
loader        micro-batches in a global sample order
shared        the same sources on every rank
stored_text   tokenised documents as text again
baselines     unigram and bigram losses to compare a run with
"""
