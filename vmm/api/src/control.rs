//! What may be asked of a running VMM, and the events it sends.
//!
//! One request or event is one JSON SEQPACKET datagram of at most [`MESSAGE_BYTES_MAX`] bytes on a connection to the
//! control socket. Each request gets exactly one [`Reply`] on its connection, in order. After [`Request::Subscribe`] the
//! connection also carries [`Event`]s. Some messages have descriptors beside them, at most
//! [`crate::snapshot::DESCRIPTORS_MAX`]. Any number of clients may come and go; the VM does not notice.
//!
//! A running VM outlives agents of newer versions: fields are only added, with a default, and a reader ignores
//! fields that it does not know.

use serde::{Deserialize, Serialize};

use crate::exit::ExitReason;
use crate::guest::WorkloadExit;
use crate::health::Health;
use crate::id::VmId;
use crate::snapshot::{SnapshotKind, SnapshotMade};
use crate::stats::Samples;

/// Longest message in bytes, either way.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// A request to a running VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Answers [`Reply::Status`].
    Status,
    /// Answers [`Reply::Status`], then sends an [`Event`] for each later change.
    Subscribe,
    /// Stops all vCPUs until [`Request::Resume`]. Legal when running; harmless when paused.
    Pause,
    /// Lets all vCPUs run. Legal when paused; harmless when running.
    Resume,
    /// Asks the guest to end its workload and power off, over the guest link. Does not wait.
    Stop,
    /// Ends the VM at once with [`ExitReason::Killed`]. The reply may or may not arrive.
    Kill,
    /// Answers [`Reply::Stats`].
    Stats,
    /// Writes a snapshot to the two files that are passed beside the request (`SCM_RIGHTS`): state, then memory; both regular
    /// files open for writing, whose content is replaced. Answers [`Reply::Snapshot`]. A running VM is paused for it and
    /// goes on; one that is paused stays so: between [`Request::Pause`], whose answer says that all I/O is at rest, and
    /// this request is the place for snapshots of its disks.
    Snapshot(SnapshotKind),
    /// Freezes memory as it is for any number of children, which share it with this VM until one of them writes. Answers
    /// [`Reply::Forked`], with descriptors beside it: state and memory of the fork, then state and memory of what it is
    /// based on. They are used as the files of a snapshot. Pauses as [`Request::Snapshot`] does.
    Fork,
    /// Writes the working set to the file that is passed beside the request: the pages that were used since a restore with
    /// [`crate::snapshot::Paging::Userfault`].
    WorkingSet,
    /// Looks at the size of a disk's backing again and tells the guest. A smaller disk is one that lost its end.
    ResizeDisk {
        /// The disk.
        id: String,
    },
    /// Goes on with another backing for a disk: the descriptor that is passed beside the request (`SCM_RIGHTS`). What is
    /// under way is finished on the old one before the answer; all later requests of the guest go to the new one.
    SwapDisk {
        /// The disk.
        id: String,
    },
    /// Gives the balloon another target. The guest follows as fast as it can; counters of [`Self::Stats`] tell how far.
    SetBalloon {
        /// Memory that the guest shall do without, in MiB, less than all.
        mib: u32,
    },
    /// Asks the guest to tell once which pages are free, and releases them. It ends by itself: `balloon.hinting` of
    /// [`Self::Stats`] is 1 while it is under way.
    StartHinting,
    /// Ends free page hinting before the guest has told all.
    StopHinting,
    /// Answers [`Reply::Metrics`].
    Metrics {
        /// Number of the first sample wanted: 0, then how many were received, until there are as many as there are in all.
        from: u32,
    },
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Done,
    /// How the VM is.
    Status(Status),
    /// Counters by name, for example `blk.root.read_bytes`. They only grow during the life of the process, but for
    /// those that tell how something is now, as `blk.root.in_flight` and what a balloon's guest says of its memory.
    Stats(std::collections::BTreeMap<String, u64>),
    /// The snapshot is written.
    Snapshot(SnapshotMade),
    /// Memory is frozen; descriptors come with the message.
    Forked(SnapshotMade),
    /// All counters, by device and queue, and histograms; a part of them.
    Metrics(Samples),
    /// Not done, and why.
    Refused {
        /// What was wrong with the request or the moment.
        reason: String,
    },
}

/// How a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Identity, as configured.
    pub vm: VmId,
    /// What it does now.
    pub phase: Phase,
    /// The guest's init reported ready.
    #[serde(default)]
    pub guest_ready: bool,
    /// How the workload ended, once it has.
    #[serde(default)]
    pub workload: Option<WorkloadExit>,
    /// What the guest's init says went wrong, at most 512 bytes.
    #[serde(default)]
    pub guest_problem: Option<String>,
    /// How the workload is, when the guest was told to look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// When things happened.
    #[serde(default)]
    pub times: BootTimes,
    /// Version of Landlock's interface that holds the VMM besides its seccomp filters; absent where the kernel has none.
    #[serde(default)]
    pub landlock: Option<u32>,
}

/// What a VMM does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// vCPUs run.
    Running,
    /// vCPUs are stopped and will go on.
    Paused,
}

/// Moments of a boot in microseconds of CLOCK_MONOTONIC of the host; absent when not reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootTimes {
    /// `main` of the VMM began.
    #[serde(default)]
    pub process_start_us: Option<u64>,
    /// The first vCPU was about to run its first instruction.
    #[serde(default)]
    pub vcpu_start_us: Option<u64>,
    /// First byte on the serial console.
    #[serde(default)]
    pub first_serial_us: Option<u64>,
    /// The guest's init connected to the guest link (it does so before it mounts anything).
    #[serde(default)]
    pub init_start_us: Option<u64>,
    /// The guest's init reported ready.
    #[serde(default)]
    pub guest_ready_us: Option<u64>,
    /// The guest wrote 123 to the boot timer.
    #[serde(default)]
    pub boot_timer_us: Option<u64>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// [`Status`] changed; the newest one. Several changes may be told by one event.
    Changed(Status),
    /// The VM has ended; the process exits next and the connection closes.
    Exited(ExitReason),
}

/// What a client reads from its connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromVmm {
    /// Answer to the oldest request that has none.
    Reply(Reply),
    /// News, after [`Request::Subscribe`].
    Event(Event),
}
