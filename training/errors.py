"""Kept importable for code outside this project; see common/errors.py."""

from common.errors import UserError as UserError
