//! What the ledger says of a VM, and how one record changes it. Pure.

use std::collections::BTreeMap;

use blixard_agent_api::{Epoch, Start};
use blixard_vmm_api::control::BootTimes;
use blixard_vmm_api::guest::WorkloadExit;
use blixard_vmm_api::{ExitReason, VmId};
use serde::{Deserialize, Serialize};

/// Which of the host's places a VM has: its uid is the first uid plus this number, its context id 3 plus this number.
pub type Slot = u32;

/// One line of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "record")]
pub enum Record {
    /// The VM is ours in this placement and has this slot.
    Admit {
        /// Which VM.
        vm: VmId,
        /// Placement.
        epoch: Epoch,
        /// Its place on this host until it is forgotten.
        slot: Slot,
    },
    /// Its volume exists, whole, under its final name. From now on a missing volume is a loss, not a beginning.
    Volume {
        /// Which VM.
        vm: VmId,
        /// Size in bytes.
        size_bytes: u64,
    },
    /// Its volume is about to be removed: from now on none is missed.
    Discard {
        /// Which VM.
        vm: VmId,
    },
    /// netd may have a nic of it from now on, or has none any more.
    Nic {
        /// Which VM.
        vm: VmId,
        /// It may exist.
        exists: bool,
    },
    /// A start begins: nothing of it exists yet.
    Begin {
        /// Which VM.
        vm: VmId,
        /// Which start.
        start: Start,
        /// Unix time in milliseconds.
        at_ms: u64,
    },
    /// A VMM may exist from now on. Durable before it can.
    Launching {
        /// Which VM.
        vm: VmId,
        /// Which start.
        start: Start,
        /// Boot id of the host: after another boot the VMM is gone for certain.
        boot: String,
    },
    /// The VMM runs.
    Launched {
        /// Which VM.
        vm: VmId,
        /// Which start.
        start: Start,
        /// Its process.
        process: ProcessId,
    },
    /// A start has ended, or cannot be.
    Ended {
        /// Which VM.
        vm: VmId,
        /// How.
        end: Box<End>,
    },
    /// Nothing of the VM is left.
    Gone {
        /// Which VM.
        vm: VmId,
    },
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: i32,
    /// Time of its start in clock ticks since boot (`proc_pid_stat(5)`, field 22).
    pub started: u64,
}

/// How a start ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Which start.
    pub start: Start,
    /// Unix time in milliseconds.
    pub at_ms: u64,
    /// What the VMM said, or what was done to it.
    #[serde(default)]
    pub exit: Option<ExitReason>,
    /// How the workload ended.
    #[serde(default)]
    pub workload: Option<WorkloadExit>,
    /// What failed; absent when it ended in good order.
    #[serde(default)]
    pub fault: Option<String>,
    /// It failed because of the host, not the VM.
    #[serde(default)]
    pub refused: bool,
    /// The guest had been ready.
    #[serde(default)]
    pub guest_ready: bool,
    /// When the VMM reached what.
    #[serde(default)]
    pub boot: BootTimes,
}

/// What is known of one VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// Placement.
    pub epoch: Epoch,
    /// Its place.
    pub slot: Slot,
    /// Size of its volume in bytes, once made.
    pub volume_bytes: Option<u64>,
    /// netd may have a nic of it.
    pub nic: bool,
    /// The newest start: number and Unix time in milliseconds.
    pub begun: Option<(Start, u64)>,
    /// The VMM of the newest start, once it may exist.
    pub launch: Option<Launch>,
    /// How the newest start ended.
    pub end: Option<Box<End>>,
}

/// A VMM that may exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Which start.
    pub start: Start,
    /// Boot id of the host.
    pub boot: String,
    /// Its process, when it was seen to run.
    pub process: Option<ProcessId>,
}

impl Known {
    /// The newest start that has begun.
    pub fn begun_start(&self) -> Start {
        self.begun.map_or(Start(0), |(start, _)| start)
    }

    /// The newest start that has ended.
    pub fn ended_start(&self) -> Option<Start> {
        self.end.as_ref().map(|end| end.start)
    }
}

impl Record {
    /// Which VM it is about.
    pub fn vm(&self) -> VmId {
        match self {
            Self::Admit { vm, .. }
            | Self::Volume { vm, .. }
            | Self::Discard { vm }
            | Self::Nic { vm, .. }
            | Self::Begin { vm, .. }
            | Self::Launching { vm, .. }
            | Self::Launched { vm, .. }
            | Self::Ended { vm, .. }
            | Self::Gone { vm } => *vm,
        }
    }

    /// What is known of the VM after this record.
    pub fn apply(self, known: Option<Known>) -> Option<Known> {
        let mut now = known.unwrap_or_default();
        match self {
            Self::Admit { epoch, slot, .. } => {
                now.epoch = epoch;
                now.slot = slot;
            }
            Self::Volume { size_bytes, .. } => now.volume_bytes = Some(size_bytes),
            Self::Discard { .. } => now.volume_bytes = None,
            Self::Nic { exists, .. } => now.nic = exists,
            Self::Begin { start, at_ms, .. } => {
                now.begun = Some((start, at_ms));
                now.launch = None;
                now.end = None;
            }
            Self::Launching { start, boot, .. } => now.launch = Some(Launch { start, boot, process: None }),
            Self::Launched { start, process, .. } => {
                let boot = now.launch.take().map(|l| l.boot).unwrap_or_default();
                now.launch = Some(Launch { start, boot, process: Some(process) });
            }
            Self::Ended { end, .. } => now.end = Some(end),
            Self::Gone { .. } => return None,
        }
        Some(now)
    }

    /// The fewest records that say what `known` says.
    pub fn of(vm: VmId, known: &Known) -> Vec<Self> {
        let mut records = vec![Self::Admit { vm, epoch: known.epoch, slot: known.slot }];
        records.extend(known.volume_bytes.map(|size_bytes| Self::Volume { vm, size_bytes }));
        records.extend(known.nic.then_some(Self::Nic { vm, exists: true }));
        records.extend(known.begun.map(|(start, at_ms)| Self::Begin { vm, start, at_ms }));
        if let Some(Launch { start, boot, process }) = &known.launch {
            records.push(Self::Launching { vm, start: *start, boot: boot.clone() });
            records.extend(process.map(|process| Self::Launched { vm, start: *start, process }));
        }
        records.extend(known.end.clone().map(|end| Self::Ended { vm, end }));
        records
    }
}

/// What a sequence of records says.
pub fn fold(records: impl IntoIterator<Item = Record>) -> BTreeMap<VmId, Known> {
    let mut known = BTreeMap::new();
    for record in records {
        let vm = record.vm();
        match record.apply(known.remove(&vm)) {
            Some(now) => known.insert(vm, now),
            None => None,
        };
    }
    known
}
