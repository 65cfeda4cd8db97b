"""Imported once, by the fork server: whatever a case would import, and nothing that touches a GPU."""

import os

# torch then asks NVML for the number of GPUs instead of CUDA, which must not be initialized before a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A thread of GNU's OpenMP that waits for another spins 300,000 times first (GOMP_SPINCOUNT in the manual of libgomp), some 12 ms:
# as long as the system lets a program run that took the core of the other. Two models at once wait for each other for good then: a
# token took some 40 times longer. With a tenth of that a quiet machine is as fast (tests/bench/bench_neighbors.py).
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "30000"

import threading

import accelerate
import accelerate.big_modeling
import accelerate.hooks
import torch
import tqdm.std
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.generation import streamers, utils
from transformers.models.auto import modeling_auto, tokenization_auto

# tqdm's own lock is shared by processes: a semaphore that stays behind when a worker is killed.
tqdm.std.tqdm.set_lock(threading.RLock())

__all__ = [
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "accelerate",
    "modeling_auto",
    "streamers",
    "tokenization_auto",
    "torch",
    "transformers",
    "utils",
]
