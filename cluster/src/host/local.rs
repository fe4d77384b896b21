//! What this node knows of its host and keeps to itself: the newest report with its age, whether the agent answers, and
//! the moments of starts. None of it is replicated: it changes too often, and is of use here only.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::watch;
use blixard_agent_api::{HostPlan, HostReport, VmReport};
use blixard_api::VmId;

/// Whether the agent answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// Nobody has asked yet.
    Unknown,
    /// It does.
    Up,
    /// It does not.
    Down {
        /// Why not.
        reason: String,
    },
}

/// The newest report.
#[derive(Debug, Clone)]
pub struct Seen {
    /// What it says.
    pub report: Arc<HostReport>,
    /// When it came.
    pub at: Instant,
}

impl Seen {
    /// What it says about a VM. Reports are in order of id.
    pub fn vm(&self, id: VmId) -> Option<&VmReport> {
        let vms = &self.report.vms;
        let found = vms.binary_search_by_key(&id, |vm| vm.vm).ok().and_then(|at| vms.get(at));
        found.or_else(|| vms.iter().find(|vm| vm.vm == id))
    }

    /// Its age in milliseconds.
    pub fn age_ms(&self) -> u64 {
        u64::try_from(self.at.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The host as this node knows it.
#[derive(Debug, Clone)]
pub struct Host {
    /// Whether the agent answers.
    pub link: Link,
    /// Its newest report.
    pub seen: Option<Seen>,
    /// What is wrong between node and agent, besides the link.
    pub trouble: Option<String>,
}

/// Moments of one start in microseconds of CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, Default)]
pub struct Moments {
    start: u64,
    /// The API had read the request.
    pub request_us: Option<u64>,
    /// The plan went to the agent.
    pub planned_us: Option<u64>,
}

/// Everything of this kind. One per node.
#[derive(Debug)]
pub struct Local {
    host: watch::Sender<Host>,
    moments: Mutex<HashMap<VmId, Moments>>,
}

impl Default for Local {
    fn default() -> Self {
        let host = Host { link: Link::Unknown, seen: None, trouble: None };
        Self { host: watch::Sender::new(host), moments: Mutex::default() }
    }
}

impl Local {
    /// The host as it is known now.
    pub fn host(&self) -> Host {
        self.host.borrow().clone()
    }

    /// A signal for each change.
    pub fn changes(&self) -> watch::Receiver<Host> {
        self.host.subscribe()
    }

    /// A report has come. One that is older than the newest of the same start of the agent changes nothing.
    pub fn see(&self, report: HostReport) {
        let at = Instant::now();
        self.host.send_modify(|host| {
            host.link = Link::Up;
            let newest = host.seen.as_ref().map(|seen| &seen.report);
            let old = newest
                .is_some_and(|n| n.agent_instance == report.agent_instance && n.revision > report.revision);
            if !old {
                host.seen = Some(Seen { report: Arc::new(report), at });
            }
        });
    }

    /// The agent did not answer.
    pub fn lost(&self, reason: String) {
        self.host.send_if_modified(|host| {
            let link = Link::Down { reason };
            let news = host.link != link;
            host.link = link;
            news
        });
    }

    /// Something is wrong between node and agent, or is right again.
    pub fn trouble(&self, trouble: Option<String>) {
        self.host.send_if_modified(|host| {
            let news = host.trouble != trouble;
            host.trouble = trouble;
            news
        });
    }

    fn moments_mut(&self) -> MutexGuard<'_, HashMap<VmId, Moments>> {
        self.moments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The API had read the request for this start at `us`. A repeated request changes nothing.
    pub fn requested(&self, vm: VmId, start: u64, us: u64) {
        let mut moments = self.moments_mut();
        let entry = moments.entry(vm).or_default();
        if entry.start < start {
            *entry = Moments { start, ..Moments::default() };
        }
        if entry.start == start {
            entry.request_us.get_or_insert(us);
        }
    }

    /// This plan goes to the agent at `us`.
    pub fn planned(&self, plan: &HostPlan, us: u64) {
        let mut moments = self.moments_mut();
        for vm in &plan.vms {
            let entry = moments.entry(vm.vm).or_default();
            if entry.start < vm.start.0 {
                *entry = Moments { start: vm.start.0, ..Moments::default() };
            }
            if entry.start == vm.start.0 {
                entry.planned_us.get_or_insert(us);
            }
        }
        if moments.len() > plan.vms.len().saturating_mul(2).saturating_add(1000) {
            moments.retain(|id, _| plan.vms.iter().any(|vm| vm.vm == *id));
        }
    }

    /// The moments of this start.
    pub fn moments(&self, vm: VmId, start: u64) -> Moments {
        self.moments_mut().get(&vm).filter(|m| m.start == start).copied().unwrap_or_default()
    }
}
