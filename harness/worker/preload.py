"""Imported once, by the fork server: whatever a case would import, and nothing that touches a GPU."""

import os

# torch then asks NVML for the number of GPUs instead of CUDA, which must not be initialised before a fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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
