"""The optimizer's side of a step: from the first gradient after `backward()` to the weights of the next forward.

Read this page first; it names the file of each stage. `execution.py` runs the stages in their order: the one that
calls the stages of a layout is the executor that `build_executor` returns for it. Ranks that hold the same weights are
replicas: those of the data and of the context dimension.

Two things are known before the first step. Each parameter carries a `ParameterInfo` (parameter_info.py), the only thing
that is attached to parameters. pretrain/gradient_buckets.py sorts the parameters into a list of `GradientBucket`s
(buckets.py), which the optimizer and `FlatGradients` both receive: a bucket is a parameter group of AdamW, and under
ZeRO also one message of gradients and one of weights.

**A step under ZeRO-1**, where replicas share out the optimizer's state (`AccumulatingExecutor`):

1. gradients.py, `FlatGradients.clear`: each bucket has a flat buffer, and every `parameter.grad` becomes a view of it.
2. weights.py, `FlatWeights.arriving`: the first micro-batch's forward waits for each bucket's weights right before the
   module that reads them, while the next bucket is on its way.
3. layers/linear.py: products take compute weights (compute_weights.py), the weights in the precision of the product.
   In the backward they add each weight's gradient to its view, in fp32; the step's first product writes over what is
   there. Autograd adds the gradients of everything that is no matrix product.
4. gradients.py, `FlatGradients.accumulating`: in the last micro-batch's backward, a hook on the bucket's
   `GradientBucket.completed_by` starts a reduce-scatter. At the end each rank has the mean gradient of its own share of
   each bucket.
5. clipping.py, `Clipping.prepare`: within the engine's step(), ranks add up the squares of the gradients that they own.
   The norm stays on the device. AdamW's kernel divides gradients by the clipping factor, and skips the step where
   step_guard.py says so: loss or norm is not finite or beyond a limit.
6. deepspeed_adapter.py, `ShardedOptimizer`: DeepSpeed's step() hands AdamW this rank's shares, bucket by bucket, and
   writes the new fp32 share to where the next gather sends it from. Of weights that only products read that is a
   buffer of compute weights. With `optimizer.kind: muon` that step is muon.py's: ranks gather the directions of a
   bucket, and each orthogonalises the matrices that its share has a part of.
7. weights.py: other ranks' weights are old from here on, and a forward that would read them is refused. The next step
   begins with stage 1, and its stage 2 gathers them; validation calls `FlatWeights.gather` first.

**Without replicas** the engine runs without ZeRO (`AccumulatingExecutor` as well). Gradients are the parameters' own,
and DeepSpeed's step leaves none of them, so that the first micro-batch makes them anew. Nothing is reduced or gathered.
`clip_before_steps` (clipping.py) prepares the factor in a hook of AdamW, which steps whole parameters. On a GPU AdamW's
kernel writes the compute weights with them (model/ops/cuda/adamw.py); elsewhere `ComputeWeights.update` converts the
weights when the next step begins.

**ZeRO-2** differs in stages 1 and 4 (partitioned_gradients.py). The buckets of layers take two slots of memory in
turns. Every micro-batch's backward reduces each of them, and the rank adds its share to that of the micro-batches
before. To DeepSpeed's engine it is stage 1, and so is ZeRO-3: its own stages reduce and gather parameter by parameter.

**ZeRO-3** differs from ZeRO-2 in stages 2 and 7 (partitioned_weights.py). Of the layers' weights a rank keeps its share
alone, in the precision of products. A product that asks for its weights waits for their bucket, in the backward once
more, and has the next bucket sent meanwhile; two slots of memory hold both.

**Pipelines** (`PipelinedExecutor`, without ZeRO or with stage 1): megatron-core's schedule orders forwards and
backwards, so nothing overlaps with them. All backwards are `overwritten`, `FlatGradients.reduce` follows the last one,
and `FlatWeights.gather` follows the step. Between backward and reduction, the first and the last stage add up their
gradients of a tied embedding.

engine.py makes the engine, and reads and writes whole weights and moments for checkpoints, whatever ZeRO does with
them. deepspeed_adapter.py alone knows DeepSpeed.
"""
