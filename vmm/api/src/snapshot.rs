//! Snapshots and forks: where a restored VM comes from, what is asked and what is answered.

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, DescriptorName, check};

/// Most snapshots that one snapshot is based on.
pub const BASES_MAX: usize = 8;
/// Most descriptors beside one control message.
pub const DESCRIPTORS_MAX: usize = 8;

/// A snapshot: state and memory belong to the same instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotFiles {
    /// The state file.
    pub state: DescriptorName,
    /// The memory file.
    pub memory: DescriptorName,
}

/// How a restored VM gets its memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Paging {
    /// The memory file is mapped; a page is read when it is first used, and copied when it is first written.
    #[default]
    Map,
    /// A thread answers page faults from the memory file (`userfaultfd`), and notes them.
    Userfault,
}

/// Where a restored VM comes from. Devices, consoles and sockets are those of the [`crate::VmConfig`]: a device of the
/// snapshot gets what the configuration has under the same id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// The snapshot.
    pub snapshot: SnapshotFiles,
    /// What a diff snapshot is based on: a full one, then diffs, each based on the one before.
    #[serde(default)]
    pub bases: Vec<SnapshotFiles>,
    /// How memory comes in.
    #[serde(default)]
    pub paging: Paging,
    /// `/dev/userfaultfd`; without it the system call is used, which needs privileges on most hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub userfaultfd: Option<DescriptorName>,
    /// A working set that was recorded: its pages are there before the guest goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set: Option<DescriptorName>,
    /// The guest's kvmclock has gone on since the snapshot. Otherwise it goes on from where it was.
    #[serde(default)]
    pub clock_went_on: bool,
    /// The VM is paused at first.
    #[serde(default)]
    pub paused: bool,
}

impl RestoreConfig {
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        check(self.bases.len() <= BASES_MAX, "restore.bases", || format!("more than {BASES_MAX}"))?;
        let uffd = self.userfaultfd.is_none() || self.paging == Paging::Userfault;
        check(uffd, "restore.userfaultfd", || "needs paging by userfault".into())
    }

    pub(crate) fn descriptor_uses(&self) -> Vec<(String, &str)> {
        let mut uses = vec![];
        for (i, files) in self.bases.iter().enumerate() {
            uses.push((format!("restore.bases[{i}].state"), files.state.as_str()));
            uses.push((format!("restore.bases[{i}].memory"), &files.memory));
        }
        uses.push(("restore.snapshot.state".to_owned(), &self.snapshot.state));
        uses.push(("restore.snapshot.memory".to_owned(), &self.snapshot.memory));
        for (field, name) in [("userfaultfd", &self.userfaultfd), ("working_set", &self.working_set)] {
            uses.extend(name.as_deref().map(|name| (format!("restore.{field}"), name)));
        }
        uses
    }
}

/// What guest memory is made of, and what is done about it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Pages of 2 MiB from the host's pool (`hugetlbfs`). The host has to have them.
    #[serde(default)]
    pub huge_pages: bool,
    /// The kernel may use transparent huge pages, also where it gives them only to those who ask.
    #[serde(default)]
    pub transparent_huge_pages: bool,
    /// VMs share equal pages: the host may merge them (KSM), and kernel and initramfs are mapped from their files rather than read,
    /// which costs huge pages and a fast start. VMs that share pages can find that out by timing.
    #[serde(default)]
    pub merge: bool,
    /// Note which pages are written, so that snapshots after the first may be diffs. Costs a fault per page and interval.
    #[serde(default)]
    pub track_writes: bool,
    /// Memory is a file from the start, so that the first fork copies nothing. Costs huge pages, and with them a faster start.
    #[serde(default)]
    pub fork_ready: bool,
}

/// Which memory a snapshot has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// All that is not zero.
    Full,
    /// The pages that changed since the snapshot before, which it is based on.
    Diff,
}

/// A snapshot that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMade {
    /// Its id, random, in hexadecimal.
    pub id: String,
    /// The id of the one it is based on, for a diff.
    #[serde(default)]
    pub parent: Option<String>,
    /// Bytes of memory that were written.
    pub memory_bytes: u64,
    /// Bytes of state.
    pub state_bytes: u64,
    /// How long vCPUs stood still for it, in microseconds; absent when the VM was paused before.
    #[serde(default)]
    pub pause_us: Option<u64>,
}
