"""`evalcache report` and `evalcache ui`: the audit as one page of HTML that needs no network and no script."""

from evalcache.report.document import page

__all__ = ["page"]
