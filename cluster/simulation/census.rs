//! Which VM runs where, as nobody in the cluster knows it: each VM runs on one host at a time, and each placement of it on one host
//! ever.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blixard_node::state::NodeId;
use blixard_vmm_api::VmId;

use crate::trace::Trace;

#[derive(Debug, Default)]
struct Inner {
    /// Hosts on which it runs now, with the epoch.
    running: BTreeMap<VmId, BTreeMap<NodeId, u64>>,
    placements: BTreeMap<(VmId, u64), NodeId>,
    begun: u64,
}

/// The census of one run. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Census {
    inner: Arc<Mutex<Inner>>,
    trace: Trace,
}

impl Census {
    /// Nothing runs.
    pub fn new(trace: Trace) -> Self {
        Self { inner: Arc::default(), trace }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A VM runs from now on, or runs on.
    pub fn runs(&self, vm: VmId, epoch: u64, node: NodeId) {
        let inner = &mut *self.inner();
        inner.begun += 1;
        self.trace.note(format_args!("{node} runs {vm} of epoch {epoch}"));
        let hosts = inner.running.entry(vm).or_default();
        hosts.insert(node, epoch);
        if hosts.len() > 1 {
            self.trace.wrong(format_args!("{vm} runs on several nodes at once (node: epoch): {hosts:?}"));
        }
        let first = *inner.placements.entry((vm, epoch)).or_insert(node);
        if first != node {
            self.trace.wrong(format_args!("{vm} ran under epoch {epoch} on node {first} and now on {node}"));
        }
    }

    /// It does not run there any more: ended, frozen or without power.
    pub fn ended(&self, vm: VmId, node: NodeId) {
        if let Some(hosts) = self.inner().running.get_mut(&vm) {
            hosts.remove(&node);
        }
    }

    /// How often a VM began to run.
    pub fn begun(&self) -> u64 {
        self.inner().begun
    }
}
