"""What jobs say, word for word."""

import math

import pytest
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from dmat_ray import wording


def test_numbers_have_their_nouns() -> None:
    assert [wording.number_of(n, "shard") for n in (0, 1, 1000)] == ["0 shards", "1 shard", "1,000 shards"]
    assert wording.number_of(4, "actor", 2) == "2 to 4 actors"
    assert wording.number_of(4, "actor", 4) == "4 actors"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 minutes"), (3599, "60 minutes"), (5400, "1.5 hours"), (200_000, "2.3 days")],
)
def test_durations_are_as_precise_as_one_would_say_them(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


def test_what_is_to_go_is_what_is_left_at_the_speed_so_far() -> None:
    report = {"kimg": 4.0, "loss_g": 1.0, "images_per_second": 20.0}
    assert wording.to_go(report, 10) == ", about 5 minutes to go"
    assert wording.to_go(report, 4) == ""
    assert wording.to_go({**report, "loss_g": math.nan}, 10) == "", "it ends here"


class Settings(BaseModel):
    """A value of every kind that settings have."""

    model_config = ConfigDict(strict=True)
    count: int = Field(ge=1)
    rate: FiniteFloat = Field(0.1, gt=0, le=1)
    knots: tuple[float, ...] = ()
    name: str = ""


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "is missing"),
        ({"count": "many"}, "must be a whole number"),
        ({"count": 0}, "must be 1 or more"),
        ({"count": 1, "rate": 0}, "must be more than 0"),
        ({"count": 1, "rate": 2.5}, "must be 1 or less"),
        ({"count": 1, "rate": math.inf}, "must be a finite number"),
        ({"count": 1, "knots": 3}, "must be a list"),
        ({"count": 1, "name": 3}, "must be a text"),
    ],
)
def test_wrong_values_are_told_of_in_plain_words(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Settings.model_validate(values)
    assert [wording.wrong(error) for error in raised.value.errors()] == [text]
