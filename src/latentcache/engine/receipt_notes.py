"""The notes of receipts as messages for the user."""

from __future__ import annotations

from latentcache.dataset.receipts import Receipt


def notes_of(receipt: Receipt) -> dict[str, str]:
    """Return the messages about a unit that a user should see, by event name."""
    notes: dict[str, str] = {}
    agreement_db = (receipt.notes or {}).get("decoder_agreement_db")
    if agreement_db is not None:
        notes["other_decoder"] = (
            "qa.decoder belongs to another encoder than vae.checkpoint; on the QA images the "
            f"two agree to {agreement_db} dB, which is accepted"
        )
    triton = (receipt.versions or {}).get("triton", "")
    if triton.startswith("unusable"):
        notes["no_fused_kernels"] = (
            f"a worker encodes without fused kernels, which is slower: triton is {triton}"
        )
    if (receipt.notes or {}).get("gathered_by_key"):
        notes["gathered_by_key"] = (
            f"{receipt.record.unit.title} is not grouped by key, or contains links: such tars are "
            "read three times; repack them with the files of each sample next to each other"
        )
    if receipt.extra_image_fields:
        fields = ", ".join(receipt.extra_image_fields)
        notes["extra_images"] = (
            f"samples have further images, which are counted but not encoded: {fields}"
        )
    return notes
