import re

from hypothesis import given
from hypothesis import strategies as st

from epd_connector.keys import ModelIdentity, build_key

identities = st.builds(
    ModelIdentity,
    model=st.text(),
    revision=st.none() | st.text(),
    dtype=st.text(),
    vllm_minor=st.text(),
    mm_processor_kwargs=st.dictionaries(st.text(), st.integers() | st.text()),
    video_pruning_rate=st.none() | st.floats(0, 0.99),
    namespace=st.text(),
)


@given(identities, st.text(alphabet=st.characters(exclude_categories=())))
def test_key_has_one_shape_whatever_a_client_sends(identity: ModelIdentity, item_id: str) -> None:
    assert re.fullmatch(r"ec/v1/[0-9a-f]{64}/[0-9a-f]{64}", build_key(identity.digest(), item_id))


@given(st.text(), st.text())
def test_different_items_have_different_keys(one: str, other: str) -> None:
    assert (build_key("m", one) == build_key("m", other)) == (one == other)


@given(identities, identities)
def test_different_models_have_different_digests(one: ModelIdentity, other: ModelIdentity) -> None:
    assert (one.digest() == other.digest()) == (one == other)


def test_text_cannot_move_between_fields() -> None:
    assert ModelIdentity(model="a", revision="b").digest() != ModelIdentity(model="ab", revision="").digest()
    assert ModelIdentity(model="a", revision=None).digest() != ModelIdentity(model="a", revision="None").digest()


def test_order_of_processor_kwargs_does_not_matter() -> None:
    one = ModelIdentity(model="m", mm_processor_kwargs={"a": 1, "b": 2})
    assert one.digest() == ModelIdentity(model="m", mm_processor_kwargs={"b": 2, "a": 1}).digest()
