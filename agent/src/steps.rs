//! From what is wanted, known and found to ordered steps. Pure: no clock, no randomness, no I/O.
//!
//! The steps are worked out anew after each one, so a step that was done already is not in the list, and a plan that
//! changes in between takes effect at the next step. Every step may be repeated.

use blixard_agent_api::{Epoch, Run, Start, VmPlan};

use crate::record::Known;

/// What of a VM's plan decides about steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// Placement.
    pub epoch: Epoch,
    /// Start.
    pub start: Start,
    /// True to run, false to be stopped.
    pub run: bool,
    /// It has a nic.
    pub nic: bool,
    /// Size of its volume in bytes.
    pub volume_bytes: u64,
}

impl Wish {
    /// The wish of a plan.
    pub fn of(plan: &VmPlan) -> Self {
        Self {
            epoch: plan.epoch,
            start: plan.start,
            run: plan.run == Run::Running,
            nic: plan.nic.is_some(),
            volume_bytes: plan.volume.size_bytes,
        }
    }
}

/// What there is of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is one independent thing that is there or not")]
pub struct Found {
    /// Its VMM is alive.
    pub vmm: bool,
    /// How far ending the VMM has come.
    pub ending: Ending,
    /// The host was booted again since the VMM was launched.
    pub rebooted: bool,
    /// Size of its volume in bytes.
    pub volume_bytes: Option<u64>,
    /// Its volume or a half-made one may exist.
    pub storage: bool,
    /// Its nic exists, or may exist.
    pub nic: bool,
    /// The nic's TAP is open and waits to be handed over.
    pub tap: bool,
    /// Its cgroup exists.
    pub cgroup: bool,
    /// Its folder of sockets exists.
    pub sockets: bool,
    /// Its folder of files (console log, exit record) exists.
    pub files: bool,
    /// All content that it needs is here.
    pub content: bool,
    /// The network of its nic exists.
    pub network: bool,
}

/// How far ending a VMM has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ending {
    /// Nobody asked it to end.
    #[default]
    NotAsked,
    /// It was asked and has time.
    Asked,
    /// Its time is over.
    Overdue,
    /// It was killed and will be gone.
    Killed,
}

/// One deed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Record the placement and give the VM a slot.
    Admit,
    /// Record that this start begins.
    Begin(Start),
    /// Make the volume if there is none, and record it.
    MakeVolume,
    /// Make the folders for sockets and files.
    MakeFolders,
    /// Make the nic and open its TAP.
    OpenNic,
    /// Make the cgroup with its limits.
    MakeCgroup,
    /// Start the VMM.
    Launch,
    /// Record that this start cannot be.
    Fail(Fault),
    /// Ask the VMM to end in good order.
    AskEnd,
    /// End the VMM at once.
    Kill,
    /// Record how the VMM ended.
    RecordEnd,
    /// Remove the nic.
    RemoveNic,
    /// Remove the cgroup.
    RemoveCgroup,
    /// Remove the folder of sockets.
    RemoveSockets,
    /// Remove the volume.
    RemoveVolume,
    /// Remove the folder of files.
    RemoveFiles,
    /// Record that nothing is left; the slot is free.
    Forget,
}

/// Why a start cannot be, as far as it can be seen without trying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The volume was made once and is not there.
    VolumeMissing,
    /// The volume is smaller than planned.
    VolumeSmaller {
        /// Size in bytes.
        found: u64,
        /// Planned size in bytes.
        planned: u64,
    },
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::VolumeMissing => f.write_str("its volume is missing: it was made here and is gone"),
            Self::VolumeSmaller { found, planned } => {
                write!(f, "its volume has {found} bytes, {planned} are planned")
            }
        }
    }
}

/// What to do for one VM, in order. Nothing to do means: it is as wanted, or an event is waited for.
pub fn steps(wish: Option<Wish>, known: Option<&Known>, found: &Found) -> Vec<Step> {
    let Some(wish) = wish else { return removal(known, found) };
    let Some(known) = known else {
        let mut steps = vec![Step::Admit];
        steps.extend(running(wish, &Known { epoch: wish.epoch, ..Known::default() }, found));
        return steps;
    };
    if wish.epoch < known.epoch {
        return vec![];
    }
    let mut steps = Vec::new();
    if wish.epoch > known.epoch {
        steps.push(Step::Admit);
    }
    if found.vmm {
        let of = known.launch.as_ref().map(|l| l.start);
        // A VMM that no record explains is not ours to talk to.
        if of.is_none() {
            steps.extend(kill(found));
        } else if !wish.run || of < Some(wish.start) {
            steps.extend(end(found));
        }
        return steps;
    }
    if let Some(launch) = &known.launch
        && known.ended_start() < Some(launch.start)
    {
        // Launched for certain, or so long ago that nobody knows: either way this start is over.
        if launch.process.is_some() || found.rebooted {
            steps.push(Step::RecordEnd);
            return steps;
        }
        // It was about to be launched when the agent died, and no process is there: this start never was.
    }
    if wish.run {
        steps.extend(running(wish, known, found));
    } else {
        steps.extend(tidy(found));
    }
    steps
}

/// Steps toward a running VMM where there is none.
fn running(wish: Wish, known: &Known, found: &Found) -> Vec<Step> {
    let over = known.begun_start() > wish.start || known.ended_start() >= Some(wish.start);
    if !wish.run || over || wish.start == Start(0) {
        return tidy(found);
    }
    let mut steps = Vec::new();
    if known.begun_start() != wish.start {
        steps.push(Step::Begin(wish.start));
    }
    match (known.volume_bytes, found.volume_bytes) {
        (Some(_), None) => {
            steps.push(Step::Fail(Fault::VolumeMissing));
            return steps;
        }
        (_, Some(found)) if found < wish.volume_bytes => {
            steps.push(Step::Fail(Fault::VolumeSmaller { found, planned: wish.volume_bytes }));
            return steps;
        }
        _ => {}
    }
    if !found.content {
        return steps;
    }
    if known.volume_bytes.is_none() {
        steps.push(Step::MakeVolume);
    }
    if !found.sockets || !found.files {
        steps.push(Step::MakeFolders);
    }
    if !found.cgroup {
        steps.push(Step::MakeCgroup);
    }
    if wish.nic && !found.network {
        return steps;
    }
    if wish.nic && !found.tap {
        steps.push(Step::OpenNic);
    }
    steps.push(Step::Launch);
    steps
}

/// Ends a VMM: asks, waits, kills.
fn end(found: &Found) -> Vec<Step> {
    match found.ending {
        Ending::NotAsked => vec![Step::AskEnd],
        Ending::Asked | Ending::Killed => vec![],
        Ending::Overdue => vec![Step::Kill],
    }
}

fn kill(found: &Found) -> Vec<Step> {
    if found.ending == Ending::Killed { vec![] } else { vec![Step::Kill] }
}

/// Gives back what a VM without a VMM does not need.
fn tidy(found: &Found) -> Vec<Step> {
    let mut steps = Vec::new();
    if found.nic || found.tap {
        steps.push(Step::RemoveNic);
    }
    if found.cgroup {
        steps.push(Step::RemoveCgroup);
    }
    if found.sockets {
        steps.push(Step::RemoveSockets);
    }
    steps
}

/// Leaves nothing.
fn removal(known: Option<&Known>, found: &Found) -> Vec<Step> {
    if found.vmm {
        return kill(found);
    }
    let mut steps = tidy(found);
    // Without a record a volume may be somebody's data.
    if found.storage && known.is_some() {
        steps.push(Step::RemoveVolume);
    }
    if found.files {
        steps.push(Step::RemoveFiles);
    }
    if known.is_some() {
        steps.push(Step::Forget);
    }
    steps
}
