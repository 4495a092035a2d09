"""What a tag of a version in MLflow says about it: the words by which a person decides there."""

REVIEW = "anchorage.review"  # set by a person in the UI: approve or reject
APPROVAL = "approval"  # how a tag of Databricks' deployment jobs begins: Approval_Check = Approved
_WORDS = {"approve": "approve", "approved": "approve", "reject": "reject", "rejected": "reject"}


def review_word(key: str, value: object) -> str | None:
    """What a tag says of its version: approve, reject, or another value of REVIEW as it is.

    None for a tag that is no review. Databricks' tag counts with one of the known words only, as
    other tags may begin like it.
    """
    word = _WORDS.get(str(value).strip().casefold())
    if key == REVIEW:
        return word or str(value).strip()
    return word if key.casefold().startswith(APPROVAL) else None
