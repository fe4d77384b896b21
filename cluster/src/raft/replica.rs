//! This node's copy of the replicated state as the rest of the process sees it: readable at any time, with a signal for
//! each change and a bounded history of them.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use blixard_api::VmId;

use crate::clock::Clock;
use crate::state::{State, VmRecord};
use crate::watch;

/// Changes of VMs that are remembered for watchers that come back.
pub const HISTORY_MAX: usize = 8192;

/// One change of one VM.
#[derive(Debug, Clone)]
pub struct Change {
    /// Revision after it.
    pub revision: u64,
    /// What changed.
    pub what: Changed,
}

/// What changed.
#[derive(Debug, Clone)]
pub enum Changed {
    /// The VM is like this now.
    Vm(Arc<VmRecord>),
    /// The VM is gone; it was like this.
    VmGone(Arc<VmRecord>),
}

#[derive(Debug, Default)]
struct History {
    changes: VecDeque<Change>,
    /// Newest revision whose change is no longer remembered.
    forgotten: u64,
}

/// A watcher asks for changes that are no longer remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("changes up to revision {forgotten} are no longer remembered")]
pub struct Compacted {
    /// Newest forgotten revision.
    pub forgotten: u64,
}

/// The state as it was last applied.
#[derive(Debug)]
pub struct Replica {
    state: RwLock<State>,
    clock: Clock,
    revision: watch::Sender<u64>,
    /// Newest revision that a restart does not undo.
    stored: AtomicU64,
    history: Mutex<History>,
    /// When the newest start of each VM was applied here: number of the start, microseconds of CLOCK_MONOTONIC.
    applied: Mutex<HashMap<VmId, (u64, u64)>>,
}

impl Replica {
    /// A replica that holds this state.
    pub fn new(state: State, clock: Clock) -> Self {
        let forgotten = state.revision();
        Self {
            revision: watch::Sender::new(forgotten),
            stored: AtomicU64::new(forgotten),
            state: RwLock::new(state),
            clock,
            history: Mutex::new(History { changes: VecDeque::new(), forgotten }),
            applied: Mutex::new(HashMap::new()),
        }
    }

    /// The state, for a short look: applying waits meanwhile.
    pub fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Index of the newest applied entry, with a signal for each change.
    pub fn revisions(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Newest revision that is on disk: after a restart this node has applied at least this much. The state is written up to a
    /// second after it was applied.
    pub fn stored(&self) -> u64 {
        self.stored.load(Ordering::Acquire)
    }

    pub(super) fn set_stored(&self, revision: u64) {
        self.stored.store(revision, Ordering::Release);
    }

    /// When this start of a VM was applied here, in microseconds of CLOCK_MONOTONIC, if it was.
    pub fn applied_us(&self, vm: VmId, start: u64) -> Option<u64> {
        let applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        applied.get(&vm).filter(|(s, _)| *s == start).map(|(_, us)| *us)
    }

    /// The changes after `revision`, oldest first, at most `limit`.
    ///
    /// # Errors
    /// [`Compacted`] when some of them are forgotten.
    pub fn changes_after(&self, revision: u64, limit: usize) -> Result<Vec<Change>, Compacted> {
        let history = self.history();
        if revision < history.forgotten {
            return Err(Compacted { forgotten: history.forgotten });
        }
        let begin = history.changes.partition_point(|change| change.revision <= revision);
        Ok(history.changes.iter().skip(begin).take(limit).cloned().collect())
    }

    /// Tells everybody about changes that are in the state now.
    pub(super) fn publish(&self, revision: u64, changes: Vec<Change>) {
        if !changes.is_empty() {
            let now = self.clock.monotonic_us();
            let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
            for change in &changes {
                match &change.what {
                    Changed::Vm(vm) if applied.get(&vm.id).is_none_or(|(start, _)| *start != vm.start) => {
                        applied.insert(vm.id, (vm.start, now));
                    }
                    Changed::Vm(_) => {}
                    Changed::VmGone(vm) => {
                        applied.remove(&vm.id);
                    }
                }
            }
            drop(applied);
            let mut history = self.history();
            history.changes.extend(changes);
            while history.changes.len() > HISTORY_MAX {
                if let Some(oldest) = history.changes.pop_front() {
                    history.forgotten = oldest.revision;
                }
            }
        }
        self.revision.send_replace(revision);
    }

    /// Puts another state in place of this one.
    pub(super) fn replace(&self, state: State) {
        let revision = state.revision();
        *self.state_mut() = state;
        *self.history() = History { changes: VecDeque::new(), forgotten: revision };
        self.revision.send_replace(revision);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watcher_that_was_away_too_long_is_told_so() {
        let replica = Replica::new(State::default(), Clock::default());
        let vm = Arc::new(crate::state::testing::vm());
        for revision in 1..=(HISTORY_MAX as u64 + 2) {
            let change = Change { revision, what: Changed::Vm(Arc::clone(&vm)) };
            replica.publish(revision, vec![change]);
        }
        assert_eq!(replica.changes_after(0, 10).unwrap_err(), Compacted { forgotten: 2 });
        let changes = replica.changes_after(2, 3).unwrap();
        assert_eq!(changes.iter().map(|c| c.revision).collect::<Vec<_>>(), [3, 4, 5]);
    }
}
