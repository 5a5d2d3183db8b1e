"""Worker process of a PyTorch baseline: one thread, gloo, data loaded beforehand.

This is a script, so that the measuring process imports no torch and this one no jax.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from stdio_protocol import redirect_stdout, serve_stdin
from torch import nn
from torch.nn import functional

TIMEOUT = timedelta(seconds=60)


class Logistic(nn.Module):
    """Logistic regression."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.softplus(-y * (x @ self.weights)).mean()


class Perceptron(nn.Module):
    """Perceptron of `benchmarks.models.mlp`."""

    def __init__(self, *arrays: torch.Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight, bias in zip(arrays[::2], arrays[1::2], strict=True):
            layer = nn.Linear(*weight.shape)
            layer.weight.data, layer.bias.data = weight.T.contiguous(), bias
            self.layers.append(layer)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return functional.cross_entropy(self.layers[-1](x), y)


MODELS = {"logistic": Logistic, "small mlp": Perceptron, "mlp": Perceptron}


def load_problem(options: argparse.Namespace) -> tuple[nn.Module, list]:
    """Returns the model and the batches of this rank."""
    file = np.load(options.folder / "problem.npz")
    arrays = [torch.tensor(file[f"params{i}"]) for i in range(file["leaves"])]
    x, y = (torch.tensor(file[name][:, options.rank]) for name in ("x", "y"))
    if y.ndim == 3:
        y = y.argmax(-1)
    return MODELS[options.model](*arrays), list(zip(x, y, strict=True))


def training_step(loss: Callable, optimizer: torch.optim.Optimizer) -> Callable:
    """Returns a training step."""

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()

    return step


def post_local(model: nn.Module, options, stack: ExitStack) -> Callable:
    """Sets up PostLocalSGDOptimizer of torch; this warm-up averages at H, 2H, …"""
    from torch.distributed.algorithms.model_averaging import averagers
    from torch.distributed.optim import PostLocalSGDOptimizer

    init_process_group(options, stack)
    averager = averagers.PeriodicModelAverager(
        options.period, warmup_steps=options.period - 1
    )
    optimizer = PostLocalSGDOptimizer(sgd(model, options), averager)
    return training_step(model, optimizer)


def accelerate_local(model: nn.Module, options, stack: ExitStack) -> Callable:
    """Sets up LocalSGD of accelerate."""
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    init_process_group(options, stack)
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, sgd(model, options))
    local = stack.enter_context(LocalSGD(accelerator, wrapped, options.period))

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        accelerator.backward(wrapped(x, y))
        optimizer.step()
        local.step()

    return step


def torchft_local(model: nn.Module, options, stack: ExitStack) -> Callable:
    """Sets up LocalSGD of torchft."""
    from torchft.local_sgd import LocalSGD

    optimizer = sgd(model, options)
    manager = make_manager(model, options, stack)
    stack.enter_context(LocalSGD(manager, model, optimizer, options.period))
    return training_step(model, optimizer)


def torchft_diloco(model: nn.Module, options, stack: ExitStack) -> Callable:
    """Sets up DiLoCo of torchft."""
    from torchft.local_sgd import DiLoCo

    optimizer = sgd(model, options)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    manager = make_manager(model, options, stack)
    stack.enter_context(DiLoCo(manager, [model], optimizer, outer, options.period))
    return training_step(model, optimizer)


def sgd(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=options.rate)


def init_process_group(options: argparse.Namespace, stack: ExitStack) -> None:
    """Creates the process group of all ranks."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    stack.callback(dist.destroy_process_group)


def make_manager(model: nn.Module, options: argparse.Namespace, stack: ExitStack):
    """Returns a torchft manager; rank 0 also runs the lighthouse."""
    from torchft.coordination import LighthouseServer
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    address = options.folder / f"{options.peer}.lighthouse"
    if options.rank == 0:
        lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=options.ranks)
        stack.callback(lighthouse.shutdown)
        port = lighthouse.address().rpartition(":")[2]
        partial = address.with_suffix(".writing")
        partial.write_text(f"http://127.0.0.1:{port}")
        partial.rename(address)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while not address.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        min_replica_size=options.ranks,
        load_state_dict=model.load_state_dict,
        state_dict=model.state_dict,
        use_async_quorum=False,
        init_sync=False,
        replica_id=str(options.rank),
        store_addr="localhost",
        store_port=store.port,
        rank=0,
        world_size=1,
        lighthouse_addr=address.read_text(),
        hostname="localhost",
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
    )
    stack.callback(lambda: manager.shutdown(wait=False))
    stack.callback(lambda: store)
    return manager


PEERS = {
    "PostLocalSGDOptimizer": post_local,
    "accelerate LocalSGD": accelerate_local,
    "torchft LocalSGD": torchft_local,
    "torchft DiLoCo": torchft_diloco,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True, choices=list(PEERS))
    parser.add_argument("--model", required=True, choices=list(MODELS))
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--ranks", required=True, type=int)
    parser.add_argument("--period", required=True, type=int)
    parser.add_argument("--rate", required=True, type=float)
    return parser.parse_args()


def main() -> None:
    options, answers = parse_arguments(), redirect_stdout()
    torch.set_num_threads(1)
    model, batches = load_problem(options)

    def params() -> list[np.ndarray]:
        arrays = [x.detach().numpy() for x in model.parameters()]
        return [x.T if x.ndim == 2 else x for x in arrays]

    with ExitStack() as stack:
        train_step = PEERS[options.peer](model, options, stack)

        def step() -> None:
            for x, y in batches:
                train_step(x, y)

        serve_stdin(answers, step, params)


if __name__ == "__main__":
    main()
