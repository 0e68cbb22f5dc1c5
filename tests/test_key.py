"""Keys: literal ones that may never change under a KEY_VERSION (add cases, never edit one), and the laws of an Action's bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalcache.canonical import decode, encode_canonical
from evalcache.digest import Digest, digest_bytes
from evalcache.errors import CanonicalError
from evalcache.key import KEY_VERSION, encode_action, key_of, keys_of
from evalcache.records import Action, Actions, Environment, Fields, Request, pack_tokens

ROOT = Digest(bytes(range(16)))
GREEDY = Fields({"do_sample": False, "end_ids": [2], "max_new_tokens": 6, "pad_id": 0, "temperature": 1.0})
HOST = Environment(Fields({"device": "cpu", "dtype": "float32", "torch": "2.13.0"}), {"device_name": "a machine"})

ACTIONS = {
    "empty": Action(Digest(bytes(16)), Request("generate", b""), Environment(Fields({}))),
    "greedy": Action(ROOT, Request("generate", pack_tokens([5, 6, 7]), GREEDY), HOST),
    "other kind": Action(ROOT, Request("loglikelihood", pack_tokens([5, 6, 7]), GREEDY), HOST),
    "other model": Action(Digest(bytes(range(1, 17))), Request("generate", pack_tokens([5, 6, 7]), GREEDY), HOST),
    "other tokens": Action(ROOT, Request("generate", pack_tokens([5, 6, 8]), GREEDY), HOST),
    "masked": Action(
        ROOT, Request("generate", pack_tokens([5, 7]), GREEDY, {"mask": b"\1\0\1", "span": pack_tokens([5, 6, 7])}), HOST
    ),
    "float setting": Action(ROOT, Request("generate", pack_tokens([5]), Fields({"repetition_penalty": 1.1})), HOST),
    "integer setting": Action(ROOT, Request("generate", pack_tokens([5]), Fields({"repetition_penalty": 1})), HOST),
    "nested input": Action(ROOT, Request("generate", b"", GREEDY, {"position_ids": ["torch.int64", [3], b"\0" * 16]}), HOST),
    "bfloat16": Action(ROOT, Request("generate", pack_tokens([5]), GREEDY), Environment(Fields({"dtype": "bfloat16"}))),
}
KEYS_1 = {
    "empty": "xxh3_128:8856ac5300cefff5779d4b5f8a4801a6",
    "greedy": "xxh3_128:87af4f38d40baa94ccf32d2719d9fde5",
    "other kind": "xxh3_128:7fb8b6349b178440855e1314a17407c8",
    "other model": "xxh3_128:fa0ee7c3d8ac0081ffb3d589bb47b511",
    "other tokens": "xxh3_128:dcb13e77c7293e30f53c0e125a15baa8",
    "masked": "xxh3_128:069179af82c2e3fad4f48deb2915fb1a",
    "float setting": "xxh3_128:e8560cd55a84be7ffd7eb6d9a7631372",
    "integer setting": "xxh3_128:112f13a9d543aab641590eab4f3f3145",
    "nested input": "xxh3_128:6a97880ecc25edb99d1d5feb814caaf1",
    "bfloat16": "xxh3_128:f15a5517411550a3434a0619f1057f33",
}

KEYS_2 = {
    "empty": "xxh3_128:00001ff135b4972becb26406e367942c",
    "greedy": "xxh3_128:0001e3e58846c5bf2941397575a2f55f",
    "other kind": "xxh3_128:0001d903167cf8c9f4c211b3b5d6f0fd",
    "other model": "xxh3_128:0102d2d872696de59af7e15e7d5c77a1",
    "other tokens": "xxh3_128:00018d7aea8dfd89e1e966d3a5401d9d",
    "masked": "xxh3_128:0001e1ba156a00f60c9b16bfd7924659",
    "float setting": "xxh3_128:00016357192a14b9b7ac821697c5999f",
    "integer setting": "xxh3_128:0001a787452d894adc9a08b6f90fcf59",
    "nested input": "xxh3_128:0001096240c3d824b63c0bd49202194b",
    "bfloat16": "xxh3_128:0001e96b7714435abfa0be4e002028b4",
}


@pytest.mark.parametrize("name", ACTIONS)
def test_a_key_never_changes(name: str) -> None:
    assert KEY_VERSION == 2
    assert str(key_of(ACTIONS[name])) == KEYS_2[name]


@pytest.mark.parametrize("name", ACTIONS)
def test_version_2_changed_the_first_bytes_and_nothing_else(name: str) -> None:
    action = ACTIONS[name]
    assert key_of(action) == action.model[:2] + digest_bytes(encode_action(action))[2:]
    ours, _, *rest = decode(encode_action(action))
    assert str(digest_bytes(encode_canonical([ours, 1, *rest]))) == KEYS_1[name]


def test_no_two_actions_share_a_key() -> None:
    assert len({key_of(action) for action in ACTIONS.values()}) == len(ACTIONS)


def test_an_action_s_bytes_are_one_array_of_eight_places() -> None:
    action = ACTIONS["masked"]
    assert decode(encode_action(action)) == [
        "evalcache",
        2,
        "generate",
        ROOT.value,
        GREEDY.digest.value,
        HOST.keyed.digest.value,
        pack_tokens([5, 7]),
        {"mask": b"\1\0\1", "span": pack_tokens([5, 6, 7])},
    ]


@given(
    st.lists(st.integers(0, 2**31 - 1), max_size=80),
    st.one_of(
        st.dictionaries(st.sampled_from(["continuation", "mask", "draw"]), st.binary(max_size=300), max_size=2),
        st.fixed_dictionaries({"continuation": st.one_of(st.text(max_size=3), st.binary(max_size=3), st.none())}),
    ),
)
def test_many_keys_at_once_are_the_keys_one_by_one(ids: list, inputs: dict) -> None:
    many = Actions(ROOT, "loglikelihood", GREEDY, HOST, [pack_tokens(ids), b""], [inputs, {}])
    one = Action(ROOT, Request("loglikelihood", pack_tokens(ids), GREEDY, inputs), HOST)
    assert keys_of(many) == [key_of(one), key_of(many[1])] == keys_of(list(many))
    head = ["evalcache", KEY_VERSION, "loglikelihood", ROOT.value, GREEDY.digest.value, HOST.keyed.digest.value]
    assert encode_action(one) == encode_canonical([*head, pack_tokens(ids), inputs])


def test_what_is_recorded_is_not_keyed() -> None:
    action = ACTIONS["greedy"]
    elsewhere = Environment(HOST.keyed, {"device_name": "another machine", "batch_rows": 8})
    assert key_of(Action(action.model, action.request, elsewhere)) == key_of(action)


def test_the_order_of_settings_and_inputs_does_not_matter() -> None:
    action = ACTIONS["masked"]
    settings = Fields(dict(reversed(list(GREEDY.items()))))
    inputs = dict(reversed(list(action.request.inputs.items())))
    turned = Request("generate", action.request.tokens, settings, inputs)
    assert key_of(Action(ROOT, turned, HOST)) == key_of(action)


def test_an_input_without_canonical_bytes_raises_and_names_its_place() -> None:
    request = Request("generate", b"", GREEDY, {"position_ids": [1, {2}]})
    with pytest.raises(CanonicalError, match=r"inputs\.position_ids\[1\]"):
        key_of(Action(ROOT, request, HOST))


@given(
    st.lists(st.integers(0, 2**31 - 1), max_size=8),
    st.lists(st.integers(0, 2**31 - 1), max_size=8),
    st.dictionaries(st.text(max_size=4), st.binary(max_size=4), max_size=2),
    st.dictionaries(st.text(max_size=4), st.binary(max_size=4), max_size=2),
)
def test_two_requests_share_a_key_only_if_they_are_equal(ids: list, others: list, inputs: dict, more: dict) -> None:
    one = Action(ROOT, Request("generate", pack_tokens(ids), GREEDY, inputs), HOST)
    two = Action(ROOT, Request("generate", pack_tokens(others), GREEDY, more), HOST)
    assert (key_of(one) == key_of(two)) == (ids == others and inputs == more)
