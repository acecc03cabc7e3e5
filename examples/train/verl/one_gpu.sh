#!/usr/bin/env bash
# Five steps of verl's trainer on one GPU, in minutes: GRPO on rollouts from q* of the bundled pair, rewarded for the
# words that a story must hold (stories.py). Run it where verl, its vLLM and midlogit[http] are installed.
#
#     bash examples/train/verl/one_gpu.sh OUT [OVERRIDES OF VERL'S CONFIGURATION]
#
# OUT gets metrics.jsonl with a line per step, rollouts.jsonl with a line per rollout, and the teacher's log.
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)
out=$(realpath -m "${1:?usage: one_gpu.sh OUT [OVERRIDES OF THE CONFIGURATION]}")
shift
mkdir -p "$out"
models=$(python3 -c 'import midlogit, pathlib; print(pathlib.Path(midlogit.__file__).parent / "bundled")')
python3 "$recipe/stories.py" "$out/rows.parquet"

# The teacher opens while verl opens its own server, which takes longer. Both are tiny, and leave memory to each other.
# Lists may grow to the whole vocabulary of 4,096 ids, as far as the bound of a token needs it.
python3 -m vllm.entrypoints.openai.api_server --model "$models/teacher" --host 127.0.0.1 --port 9001 \
  --enforce-eager --max-model-len 512 --max-logprobs 4096 --gpu-memory-utilization 0.2 --kv-cache-memory-bytes 1G \
  >"$out/teacher.log" 2>&1 &
teacher=$!
trap 'kill $teacher' EXIT

model=actor_rollout_ref.model actor=actor_rollout_ref.actor rollout=actor_rollout_ref.rollout
# The base continues plain text: it has no chat template of its own.
template="{% for m in messages %}Question: {{ m['content'] }}{{ '\n' }}Answer:{% endfor %}"
: >"$out/rollouts.jsonl"
export VERL_FILE_LOGGER_PATH=$out/metrics.jsonl ROLLOUTS=$out/rollouts.jsonl
python3 -m verl.trainer.main_ppo --config-path="$recipe" --config-name=midlogit \
  data.train_files="$out/rows.parquet" data.val_files="$out/rows.parquet" data.dataloader_num_workers=0 \
  data.train_batch_size=16 data.max_prompt_length=64 data.max_response_length=32 \
  $model.path="$models/base" $model.custom_chat_template="\"$template\"" \
  $model.use_remove_padding=False $model.enable_gradient_checkpointing=False \
  +$model.override_config.attn_implementation=eager \
  $actor.strategy=fsdp2 $actor.ppo_mini_batch_size=16 $actor.ppo_micro_batch_size_per_gpu=64 $actor.optim.lr=2e-4 \
  $actor.use_torch_compile=False $actor.fsdp_config.use_torch_compile=False $actor.fsdp_config.dtype=float32 \
  $rollout.n=8 $rollout.tensor_model_parallel_size=1 $rollout.log_prob_micro_batch_size_per_gpu=64 \
  $rollout.enforce_eager=True $rollout.max_model_len=512 $rollout.gpu_memory_utilization=0.2 \
  $rollout.engine_kwargs.vllm.max_logprobs=4096 +$rollout.engine_kwargs.vllm.kv_cache_memory_bytes=1000000000 \
  $rollout.custom.midlogit.teacher=http://127.0.0.1:9001/v1 \
  $rollout.agent.num_workers=2 \
  $rollout.checkpoint_engine.update_weights_bucket_megabytes=64 \
  reward.num_workers=1 reward.custom_reward_function.path="$recipe/stories.py" \
  transfer_queue.backend.SimpleStorage.num_data_storage_units=1 \
  trainer.n_gpus_per_node=1 trainer.total_training_steps=5 trainer.val_before_train=False \
  trainer.logger='["console","file"]' trainer.resume_mode=disable \
  +ray_kwargs.ray_init.include_dashboard=False "$@"
