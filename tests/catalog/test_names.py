"""Names as people write them: every spelling of a model of the catalog finds it, and no name finds another size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.catalog import names, resolve, shipped
from harness.core.errors import HarnessError, UsageError

SOURCES = {source.name: source for source in resolve.known_sources()}
ON_HUB = sorted(source.hub_id for source in SOURCES.values() if source.hub_id)
SIZE = re.compile(r"(?<![a-z\d.])(\d+(?:\.\d+)?)(b|m)(?![a-z\d])", re.IGNORECASE)

PAGES = (
    "{}",
    "{}/",
    "hf:{}",
    "hf://{}",
    "hf://{}@main",
    "huggingface:{}",
    "https://huggingface.co/{}",
    "http://www.huggingface.co/{}/",
    "huggingface.co/{}",
    "https://hf.co/{}",
    "https://hf-mirror.com/{}/tree/main",
    "https://huggingface.co/{}/blob/main/config.json",
    "https://huggingface.co/{}/resolve/main/model-00001-of-00002.safetensors?download=true",
    "https://huggingface.co/{}/raw/main/README.md#usage",
    "https://huggingface.co/{}/discussions/12",
    "https://huggingface.co/api/models/{}",
    "https://huggingface.co/{}?library=transformers",
    "https://huggingface.co/{}.git",
    "git@hf.co:{}",
    "ssh://git@huggingface.co/{}.git",
    "[the model](https://huggingface.co/{}/tree/main)",
    "git clone --depth 1 https://huggingface.co/{}",
    "hf download {} --local-dir ./model",
    "huggingface-cli download {}",
    "$ vllm serve {} --tensor-parallel-size 2",
    "modelscope download --model {}",
    "ollama run hf.co/{}",
    "llama-server -c 4096 -hf {}",
    "https://modelscope.cn/models/{}",
    "https://www.modelscope.cn/models/{}/summary",
    "https://modelscope.cn/models/{}/file/view/master/config.json?status=1",
    "https://modelscope.cn/models/{}/resolve/master/config.json",
)
AROUND = ("{}", '"{}"', "'{}'", "`{}`", "\u201c{}\u201d", " {} \n", "<{}>", "{},")
CASES = (str, str.upper, str.lower, str.title, str.swapcase)
DASHES = ("-", "\u2010", "\u2011", "\u2013", "\u2014", "\u2212", "_", " ", "\u00a0", "\u200b-")


@settings(max_examples=400, deadline=None)
@given(hub_id=st.sampled_from(ON_HUB), page=st.sampled_from(PAGES), around=st.sampled_from(AROUND))
def test_every_address_of_a_model_finds_it(hub_id: str, page: str, around: str) -> None:
    assert resolve.resolve(around.format(page.format(hub_id))).hub_id == hub_id


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(SOURCES)), case=st.sampled_from(CASES), dash=st.sampled_from(DASHES), around=st.sampled_from(AROUND)
)
def test_every_spelling_of_a_short_name_finds_the_model(name: str, case: type[str], dash: str, around: str) -> None:
    hub_id = SOURCES[name].hub_id
    for written in (name, hub_id.rpartition("/")[2] if hub_id else name):
        assert resolve.resolve(around.format(case(written).replace("-", dash))) == SOURCES[name]


@pytest.mark.parametrize("hub_id", ON_HUB)
def test_a_hub_id_in_another_case_and_a_folder_of_the_cache_find_the_model(hub_id: str) -> None:
    for written in (hub_id, hub_id.lower(), hub_id.upper(), f"models--{hub_id.replace('/', '--')}"):
        assert resolve.resolve(written).hub_id == hub_id
    assert shipped.hub_id(hub_id) == hub_id


@settings(max_examples=500, deadline=None)
@given(name=st.sampled_from(sorted(SOURCES)), size=st.sampled_from(["0.7b", "2.2b", "5b", "17b", "77b", "177b", "93m"]))
def test_a_size_that_a_model_does_not_have_is_never_taken_for_another(name: str, size: str) -> None:
    other = SIZE.sub(size, name, count=1)
    if other in SOURCES or other == name:
        return
    with pytest.raises(UsageError):
        resolve.resolve(other)


@settings(max_examples=500, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(SOURCES)))
def test_a_shortened_name_finds_no_other_size_and_generation(data: st.DataObject, name: str) -> None:
    has = names.words(name)
    kept = data.draw(st.lists(st.sampled_from(range(len(has))), min_size=1, unique=True).map(sorted))
    written = " ".join(has[place] for place in kept)
    try:
        found = names.words(resolve.resolve(written).name)
    except HarnessError:
        return
    if found == names.words(written):
        return
    rest = iter(found)
    assert all(word in rest for word in (has[place] for place in kept)), "all that is written stands in the name, in its order"
    alike = [other for other in SOURCES if _sizes(other) != _sizes(" ".join(found)) and _holds(names.words(other), found, written)]
    assert not alike, f"{written!r} could mean {alike} as well"


def _sizes(name: str) -> set[str]:
    return {word for word in names.words(name) if SIZE.fullmatch(word)}


def _holds(other: tuple[str, ...], found: tuple[str, ...], written: str) -> bool:
    """Say whether a name differs from the one that was found only in sizes that were not written."""
    unsaid = [word for word in other if word not in _sizes(" ".join(other)) - set(written.split())]
    return unsaid == [word for word in found if word not in _sizes(" ".join(found)) - set(written.split())]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("MOSS", "moss-moon-003-sft"),
        ("chatglm", "chatglm-6b"),
        ("chatglm2", "chatglm2-6b"),
        ("codegen-16b", "codegen-16b-mono"),
        ("stablelm tuned 7b", "stablelm-tuned-alpha-7b"),
        ("llama-3-8b-instruct", "meta-llama-3-8b-instruct"),
        ("SmolLM2 135M", "smollm2-135m"),
        ("gpt_oss_20b", "gpt-oss-20b"),
        ("qwen3:8b", "qwen3-8b"),
        ("ollama run qwen3:8b", "qwen3-8b"),
        ("ollama pull --insecure llama3.1:8b", "llama-3.1-8b"),
        ("https://huggingface.co/gpt2/tree/main", "gpt2"),
        ("https://huggingface.co/gpt2/blob/main/config.json", "gpt2"),
    ],
)
def test_what_people_write(written: str, name: str) -> None:
    assert resolve.resolve(written).name == name


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("qwen3", "can mean qwen3-0.6b, "),
        ("gpt-oss", "'gpt-oss' can mean gpt-oss-120b, gpt-oss-20b: write out which"),
        ("8b", "can mean "),
        ("qwen3-7b", "did you mean "),
        ("https://huggingface.co/datasets/a/b", "is the address of a data set, not of a model"),
        ("https://huggingface.co/", "names no model"),
        ("https://example.com/Qwen/Qwen3-8B", "is no page of a model on a hub"),
        ("hf.co/o/X-GGUF:Q4_K_M", "write o/X-GGUF and the file's name with --file"),
        ("ollama run hf.co/o/X-GGUF:Q4_K_M", "write o/X-GGUF and the file's name with --file"),
        ("llama-cli -hf o/X-GGUF:Q4_K_M -p hello", "write o/X-GGUF and the file's name with --file"),
        ("ollama run", "unknown model 'ollama run'"),
        ("ollama run --verbose", "unknown model 'ollama run --verbose'"),
        ("https://huggingface.co/gpt2/tree/v1", "names the revision 'v1'"),
        ("https://huggingface.co/o/m/tree/gptq-4bit-32g", "names the revision 'gptq-4bit-32g'"),
        ("o/m@v1.1.0", "names the revision 'v1.1.0'"),
    ],
)
def test_what_is_not_one_model_is_one_sentence(written: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve.resolve(written)
    assert said in str(caught.value)


def test_an_address_of_a_gguf_file_names_it() -> None:
    source = resolve.resolve("https://huggingface.co/o/X-GGUF/blob/main/x.Q4_K_M.gguf")
    assert (source.hub_id, source.file, source.name) == ("o/X-GGUF", "x.Q4_K_M.gguf", "x.Q4_K_M")


def test_the_hub_of_the_user_is_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://models.example:8443")
    assert resolve.resolve("https://models.example:8443/Qwen/Qwen3-8B/tree/main").hub_id == "Qwen/Qwen3-8B"


def test_what_the_hub_renamed_is_known_by_both_names() -> None:
    for old, new in shipped.renamed().items():
        assert resolve.resolve(old).hub_id == new
        assert new in shipped.catalog()
        assert old not in shipped.catalog()


def test_no_two_models_of_the_catalog_are_written_alike() -> None:
    spelled = [names.words(name) for name in SOURCES]
    assert len(set(spelled)) == len(spelled)


def cache(root: Path, commit: str, *snapshots: str) -> Path:
    folder = root / "models--org--tiny"
    for name in snapshots:
        (folder / "snapshots" / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (folder / "snapshots" / name / file).write_text("{}")
    if commit:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    return folder


@pytest.mark.parametrize(("commit", "snapshots"), [("abc", ("abc",)), ("abc", ("abc", "def")), ("", ("def",))])
def test_a_folder_of_the_hubs_cache_is_its_main_snapshot(commit: str, snapshots: tuple[str, ...], tmp_path: Path) -> None:
    folder = cache(tmp_path, commit, *snapshots)
    there = folder / "snapshots" / (commit or snapshots[0])
    for written in (folder, there):
        source = resolve.resolve(str(written))
        assert (source.name, source.kind, source.location) == ("tiny", "directory", str(there))


@pytest.mark.parametrize(
    ("commit", "snapshots", "said"),
    [
        ("abc", ("def",), "the snapshot 'abc' that refs/main names is not there: give one of snapshots/def"),
        ("", ("abc", "def"), "it has no refs/main: give one of snapshots/abc, snapshots/def"),
        ("../../..", ("abc",), "is not there"),
    ],
)
def test_a_cache_that_leaves_a_choice_is_refused(commit: str, snapshots: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        resolve.resolve(str(cache(tmp_path, commit, *snapshots)))
    assert said in str(caught.value)
