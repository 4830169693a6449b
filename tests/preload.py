"""Imported by the fork server before it forks: everything a keeper and a client need, with every kernel loaded.

Opens nothing and starts no thread, so that what is forked from it is as good as new.
"""

import penstock
import penstock.cli.fsck
import penstock.identity
import penstock.pool.client
import penstock.pool.coherence
import penstock.pool.copies
import penstock.pool.fsck
import penstock.pool.slots
import penstock.runtime.embedded
import penstock.runtime.guests
import penstock.runtime.keeper
import penstock.runtime.opening
import penstock.runtime.report
import penstock.runtime.serve
import tests.faults.disk_writer
import tests.faults.load
import tests.faults.points
import tests.support  # noqa: F401

penstock.identity.warm()
