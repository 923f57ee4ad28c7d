#!/usr/bin/env bash
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
# A launch script with common mistakes, for docs/audit_megatron.md.
TP=${TP:-4}
GPUS=8

MODEL_ARGS=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --num-query-groups 8  # without --group-query-attention
    --seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope
    --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0.0 --hidden-dropout 0.0 --vocab-size 128256
)
TRAINING_ARGS=" --bf16 --micro-batch-size 1 --global-batch-size $((SLURM_NNODES * GPUS * 4)) \
    --lr 3e-4 --train-iters 1000 --recompute-activations --no-create-attention-mask-in-dataloader"
if [[ $TP -gt 1 ]]; then
    MODEL_ARGS+=(--tensor-model-parallel-size $TP)
fi

srun torchrun --nnodes $SLURM_NNODES --nproc-per-node $GPUS pretrain_gpt.py \
    "${MODEL_ARGS[@]}" $TRAINING_ARGS --data-path "$DATA"
