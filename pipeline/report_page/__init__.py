"""The page of `pipeline report --page`: drafts, runs and caches in one HTML file."""

from pipeline.report_page.page import write_page
