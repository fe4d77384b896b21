//! Everything one VMM process is given.
//!
//! The VMM opens no path: each resource is an inherited descriptor with a name. [`VmConfig::descriptors`] maps names
//! to numbers; the other fields refer to names. The configuration itself arrives as JSON in the descriptor whose number
//! is given on the command line (`blixard-vmm --config-fd N`).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::cpu::CpuBaseline;
use crate::guest::GuestConfig;
use crate::id::VmId;
use crate::rate::RateLimit;
use crate::snapshot::{MemoryConfig, RestoreConfig};

/// Most vCPUs of one VM.
pub const VCPUS_MAX: u8 = 32;
/// Least memory of one VM in MiB: less cannot hold a kernel.
pub const MEMORY_MIB_MIN: u32 = 16;
/// Most memory of one VM in MiB (1 TiB).
pub const MEMORY_MIB_MAX: u32 = 1 << 20;
/// Longest kernel command line in bytes, without the final NUL (`COMMAND_LINE_SIZE` of Linux x86).
pub const CMDLINE_MAX: usize = 2047;
/// Most disks of one VM.
pub const DISKS_MAX: usize = 16;
/// Most persistent memories of one VM.
pub const PMEMS_MAX: usize = 8;
/// Most nics of one VM.
pub const NICS_MAX: usize = 8;
/// Most queues of the TAP of one nic, and so pairs of its virtio queues.
pub const QUEUE_PAIRS_MAX: usize = 8;
/// Largest configuration in bytes that a VMM reads.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;
/// Longest descriptor name, id or serial number in bytes (a virtio-blk serial number has 20, virtio 1.3 section 5.2.6).
pub const NAME_MAX: usize = 20;

/// Name of an inherited descriptor, for example `kernel` or `disk-root`.
pub type DescriptorName = String;

/// Configuration of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Identity, for messages only.
    pub vm: VmId,
    /// Number of vCPUs, 1 to [`VCPUS_MAX`].
    pub vcpus: u8,
    /// Guest memory in MiB, [`MEMORY_MIB_MIN`] to [`MEMORY_MIB_MAX`].
    pub memory_mib: u32,
    /// Descriptor of `/dev/kvm`.
    pub kvm: DescriptorName,
    /// Kernel: bzImage or ELF vmlinux. Empty for a VM that is restored.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kernel: DescriptorName,
    /// Initial RAM file system, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<DescriptorName>,
    /// Kernel command line, at most [`CMDLINE_MAX`] bytes of printable ASCII.
    #[serde(default)]
    pub cmdline: String,
    /// What `blixard-init` shall do; handed over as `/blixard.json` in an archive behind the initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestConfig>,
    /// Block devices, in the order in which the guest finds them.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network devices, in the order in which the guest finds them.
    #[serde(default)]
    pub nics: Vec<NicConfig>,
    /// Host-guest streams.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Persistent memories, in the order in which the guest finds them (`/dev/pmem0`, …).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<PmemConfig>,
    /// Entropy device.
    #[serde(default)]
    pub rng: bool,
    /// How fast the entropy device may be.
    #[serde(default)]
    pub rng_limit: RateLimit,
    /// Memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Serial console.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// Listening SEQPACKET socket on which `control` requests arrive, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<DescriptorName>,
    /// File that receives one JSON [`crate::exit::ExitRecord`] when the VM ends, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_record: Option<DescriptorName>,
    /// Offer the one-byte boot timer at guest address 0xC000_0000 (the guest writes 123 when it has booted).
    #[serde(default)]
    pub boot_timer: bool,
    /// Where guest memory comes from.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// Offer no more of the processor than this; absent means all that the host has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuBaseline>,
    /// Go on from this snapshot instead of booting. vCPUs, memory and devices have to be those of the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<RestoreConfig>,
    /// Descriptor numbers by name. Each name is used exactly once above.
    pub descriptors: BTreeMap<DescriptorName, i32>,
}

/// One virtio-blk device over a raw file or block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name of the device for messages and counters.
    pub id: String,
    /// Its virtio-blk serial number, 1 to 20 letters, digits, - and _; absent: the id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The backing file or block device; its size is a multiple of 512 bytes and not 0.
    pub backing: DescriptorName,
    /// Refuse writes. The descriptor may then be read-only.
    #[serde(default)]
    pub read_only: bool,
    /// How fast it may be.
    #[serde(default)]
    pub limit: RateLimit,
}

/// One virtio-pmem device: a file or block device that is mapped into the guest's physical memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// Name of the device for messages and counters.
    pub id: String,
    /// The backing; its size is a multiple of 2 MiB and not 0.
    pub backing: DescriptorName,
    /// The guest cannot write, and all VMs with this backing share one copy in the host's memory. The descriptor may then
    /// be read-only.
    #[serde(default)]
    pub read_only: bool,
}

/// The virtio-balloon device: memory that the guest does without for a while.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Size at the start in MiB, less than the memory of the VM.
    #[serde(default)]
    pub target_mib: u32,
    /// The guest takes memory back by itself before it runs out of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// How often the guest tells its memory statistics, in seconds; 0 for never.
    #[serde(default)]
    pub statistics_s: u16,
    /// The guest tells continuously which pages are free, and they are released.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// The guest can be asked to tell which pages are free, and they are released.
    #[serde(default)]
    pub free_page_hinting: bool,
}

/// One virtio-net device over the descriptors of one TAP (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, 12-byte header).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// Name of the device for messages and counters.
    pub id: String,
    /// The TAP queue.
    pub tap: DescriptorName,
    /// Further queues of the same TAP (IFF_MULTI_QUEUE). The device has a pair of virtio queues for each queue of the TAP,
    /// at most [`QUEUE_PAIRS_MAX`] in all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_taps: Vec<DescriptorName>,
    /// Descriptors of `/dev/vhost-net`, none or one per queue of the TAP: the kernel then passes the frames itself.
    /// Not possible together with limits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vhost: Vec<DescriptorName>,
    /// Hardware address, unicast.
    pub mac: MacAddr,
    /// Largest packet the guest may send, in bytes (virtio-net MTU).
    #[serde(default = "mtu_default")]
    pub mtu: u16,
    /// Limit on frames to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receive_limit: Option<RateLimit>,
    /// Limit on frames from the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_limit: Option<RateLimit>,
}

impl NicConfig {
    fn validate(&self, field: &str) -> Result<(), ConfigError> {
        check(self.mac.is_unicast(), &format!("{field}.mac"), || "not a unicast address".into())?;
        check(self.mtu >= 68, &format!("{field}.mtu"), || "less than 68 bytes (RFC 791)".into())?;
        let pairs = 1 + self.more_taps.len();
        check(pairs <= QUEUE_PAIRS_MAX, &format!("{field}.more_taps"), || {
            format!("{pairs} queues of the TAP with the first one, 1 to {QUEUE_PAIRS_MAX} are possible")
        })?;
        let vhost = self.vhost.len();
        check(vhost == 0 || vhost == pairs, &format!("{field}.vhost"), || {
            format!(
                "{vhost} descriptors of vhost-net for {pairs} queues of the TAP: none or as many are possible"
            )
        })?;
        for (name, limit) in [("receive_limit", &self.receive_limit), ("send_limit", &self.send_limit)] {
            let Some(limit) = limit else { continue };
            check(vhost == 0, &format!("{field}.{name}"), || {
                "a nic served by vhost-net cannot be limited: the kernel passes its frames uncounted".into()
            })?;
            limit.validate(&format!("{field}.{name}"))?;
        }
        Ok(())
    }
}

fn mtu_default() -> u16 {
    1500
}

/// The virtio-vsock device. Host programs connect to the listener and write `CONNECT <port>\n`; the answer is
/// `OK <port>\n`, after which the connection is the stream to that port of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Context id of the guest, 3 or more.
    pub cid: u32,
    /// Listening STREAM socket for connections from the host.
    pub listener: DescriptorName,
    /// Connected SEQPACKET socket: for each stream that the guest opens to a port of the host (other than the guest link's)
    /// its other end receives the port, four bytes little-endian, with the connected stream socket. Without it the guest is
    /// refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook: Option<DescriptorName>,
}

/// Where the serial console's output goes and where its input comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Output is appended to this file, if any. When it has reached `log_bytes_max` it is emptied and starts anew,
    /// so that a chatty guest cannot fill the host's disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<DescriptorName>,
    /// Size at which the log starts anew, in bytes; 0 means 8 MiB.
    #[serde(default)]
    pub log_bytes_max: u64,
    /// Listening STREAM socket: a client receives what was printed last (up to 64 KiB) and then all output; what it
    /// sends is typed. One client types and reads at a time; a newer one replaces it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listener: Option<DescriptorName>,
    /// Use the process's own standard input and output (developer front end).
    #[serde(default)]
    pub stdio: bool,
}

/// A hardware address; its text form is `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// True for the address of one device rather than of a group (IEEE 802.3 section 3.2.3).
    pub fn is_unicast(self) -> bool {
        let [first, ..] = self.0;
        first & 1 == 0
    }
}

impl std::fmt::Display for MacAddr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

/// A text that is not a hardware address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a hardware address such as 52:54:00:12:34:56")]
pub struct NotAMacAddr;

impl TryFrom<String> for MacAddr {
    type Error = NotAMacAddr;

    fn try_from(text: String) -> Result<Self, NotAMacAddr> {
        text.parse()
    }
}

impl std::str::FromStr for MacAddr {
    type Err = NotAMacAddr;

    fn from_str(text: &str) -> Result<Self, NotAMacAddr> {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or(NotAMacAddr)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| NotAMacAddr)?;
        }
        if parts.next().is_some() { Err(NotAMacAddr) } else { Ok(Self(mac)) }
    }
}

/// Why a configuration is refused: the field, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConfigError {
    /// The field, as a path such as `disks[1].id`.
    pub field: String,
    /// What is wrong and what is allowed.
    pub problem: String,
}

impl VmConfig {
    /// Checks all that can be checked without touching a descriptor.
    ///
    /// # Errors
    /// The first field that is out of range, the name that is missing, used twice or not used.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check(self.vcpus >= 1 && self.vcpus <= VCPUS_MAX, "vcpus", || {
            format!("{} vCPUs asked for, 1 to {VCPUS_MAX} are possible", self.vcpus)
        })?;
        let memory = self.memory_mib;
        check((MEMORY_MIB_MIN..=MEMORY_MIB_MAX).contains(&memory), "memory_mib", || {
            format!("{memory} MiB asked for, {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX} are possible")
        })?;
        check(self.cmdline.len() <= CMDLINE_MAX, "cmdline", || format!("longer than {CMDLINE_MAX} bytes"))?;
        check(self.cmdline.bytes().all(|b| (0x20..0x7f).contains(&b)), "cmdline", || {
            "only printable ASCII is possible".into()
        })?;
        check(self.disks.len() <= DISKS_MAX, "disks", || format!("more than {DISKS_MAX}"))?;
        check(self.nics.len() <= NICS_MAX, "nics", || format!("more than {NICS_MAX}"))?;
        let mut ids = BTreeSet::new();
        for (i, disk) in self.disks.iter().enumerate() {
            check_name(&disk.id, &format!("disks[{i}].id"))?;
            check(ids.insert(&disk.id), &format!("disks[{i}].id"), || "used twice".into())?;
            if let Some(serial) = &disk.serial {
                check_name(serial, &format!("disks[{i}].serial"))?;
            }
            disk.limit.validate(&format!("disks[{i}].limit"))?;
        }
        check(self.pmem.len() <= PMEMS_MAX, "pmem", || format!("more than {PMEMS_MAX}"))?;
        for (i, pmem) in self.pmem.iter().enumerate() {
            check_name(&pmem.id, &format!("pmem[{i}].id"))?;
            check(ids.insert(&pmem.id), &format!("pmem[{i}].id"), || "used twice".into())?;
        }
        let file = self.memory.huge_pages || self.memory.fork_ready;
        check(!(self.memory.merge && file), "memory.merge", || {
            "only anonymous memory is merged, which huge_pages and fork_ready exclude".into()
        })?;
        self.rng_limit.validate("rng_limit")?;
        if let Some(balloon) = &self.balloon {
            check(balloon.target_mib < self.memory_mib, "balloon.target_mib", || {
                format!("{} MiB of {} MiB memory", balloon.target_mib, self.memory_mib)
            })?;
        }
        for (i, nic) in self.nics.iter().enumerate() {
            check_name(&nic.id, &format!("nics[{i}].id"))?;
            check(ids.insert(&nic.id), &format!("nics[{i}].id"), || "used twice".into())?;
            nic.validate(&format!("nics[{i}]"))?;
            check(nic.vhost.is_empty() || !self.memory.track_writes, &format!("nics[{i}].vhost"), || {
                "what vhost-net writes into guest memory is not tracked".into()
            })?;
        }
        if let Some(vsock) = &self.vsock {
            check(vsock.cid >= 3 && vsock.cid < u32::MAX, "vsock.cid", || {
                "0 to 2 and 4294967295 are reserved (virtio 1.3 section 5.10.4)".into()
            })?;
        }
        if let Some(guest) = &self.guest {
            guest.validate()?;
            let initramfs = self.initramfs.is_some() || self.restore.is_some();
            check(initramfs, "guest", || "needs an initramfs that holds blixard-init".into())?;
        }
        if let Some(restore) = &self.restore {
            restore.validate()?;
            let booted = self.initramfs.is_some() || !self.kernel.is_empty();
            check(!booted, "restore", || {
                "kernel and initramfs are not read for a VM that is restored".into()
            })?;
        }
        self.validate_descriptors()
    }

    fn validate_descriptors(&self) -> Result<(), ConfigError> {
        let mut unused: BTreeSet<&str> = self.descriptors.keys().map(String::as_str).collect();
        for (field, name) in self.descriptor_uses() {
            check_name(name, &field)?;
            check(self.descriptors.contains_key(name), &field, || {
                format!("no descriptor is named {name:?}")
            })?;
            check(unused.remove(name), &field, || format!("descriptor {name:?} is used twice"))?;
        }
        if let Some(name) = unused.first() {
            return Err(ConfigError {
                field: format!("descriptors.{name}"),
                problem: "nothing uses it".into(),
            });
        }
        let mut numbers = BTreeSet::new();
        for (name, number) in &self.descriptors {
            let field = format!("descriptors.{name}");
            check(*number > 2, &field, || "0 to 2 are the standard streams".into())?;
            check(numbers.insert(number), &field, || "number used twice".into())?;
        }
        Ok(())
    }

    /// Each use of a descriptor: the field that uses it and the name.
    pub fn descriptor_uses(&self) -> Vec<(String, &str)> {
        let mut uses = vec![("kvm".to_owned(), self.kvm.as_str())];
        match &self.restore {
            Some(restore) => uses.extend(restore.descriptor_uses()),
            None => uses.push(("kernel".to_owned(), &self.kernel)),
        }
        let optional = [
            ("initramfs", &self.initramfs),
            ("control", &self.control),
            ("exit_record", &self.exit_record),
            ("console.log", &self.console.log),
            ("console.listener", &self.console.listener),
        ];
        for (field, name) in optional {
            uses.extend(name.as_deref().map(|n| (field.to_owned(), n)));
        }
        uses.extend(self.vsock.as_ref().map(|v| ("vsock.listener".to_owned(), v.listener.as_str())));
        let hook = self.vsock.as_ref().and_then(|vsock| vsock.hook.as_deref());
        uses.extend(hook.map(|name| ("vsock.hook".to_owned(), name)));
        for (i, disk) in self.disks.iter().enumerate() {
            uses.push((format!("disks[{i}].backing"), &disk.backing));
        }
        for (i, pmem) in self.pmem.iter().enumerate() {
            uses.push((format!("pmem[{i}].backing"), &pmem.backing));
        }
        for (i, nic) in self.nics.iter().enumerate() {
            uses.push((format!("nics[{i}].tap"), &nic.tap));
            for (field, names) in [("more_taps", &nic.more_taps), ("vhost", &nic.vhost)] {
                let each = names.iter().enumerate();
                uses.extend(each.map(|(n, name)| (format!("nics[{i}].{field}[{n}]"), name.as_str())));
            }
        }
        uses
    }
}

pub(crate) fn check(ok: bool, field: &str, problem: impl FnOnce() -> String) -> Result<(), ConfigError> {
    if ok { Ok(()) } else { Err(ConfigError { field: field.into(), problem: problem() }) }
}

fn check_name(name: &str, field: &str) -> Result<(), ConfigError> {
    let fits = !name.is_empty() && name.len() <= NAME_MAX;
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    check(fits && plain, field, || format!("1 to {NAME_MAX} letters, digits, - and _ are possible"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::Bucket;

    fn config() -> VmConfig {
        VmConfig {
            vm: VmId::from_u128(1),
            vcpus: 1,
            memory_mib: 128,
            kvm: "kvm".into(),
            kernel: "kernel".into(),
            initramfs: None,
            cmdline: "console=ttyS0".into(),
            guest: None,
            disks: vec![DiskConfig {
                id: "root".into(),
                serial: None,
                backing: "disk-root".into(),
                read_only: true,
                limit: RateLimit::default(),
            }],
            nics: vec![],
            vsock: None,
            pmem: vec![],
            rng: true,
            rng_limit: RateLimit::default(),
            balloon: None,
            console: ConsoleConfig::default(),
            control: None,
            exit_record: None,
            boot_timer: false,
            memory: MemoryConfig::default(),
            cpu: None,
            restore: None,
            descriptors: [("kvm".into(), 3), ("kernel".into(), 4), ("disk-root".into(), 5)].into(),
        }
    }

    fn refused(change: impl FnOnce(&mut VmConfig)) -> String {
        let mut config = config();
        change(&mut config);
        config.validate().expect_err("must be refused").field
    }

    #[test]
    fn a_plain_configuration_is_accepted_and_survives_json() {
        config().validate().unwrap();
        let text = serde_json::to_string(&config()).unwrap();
        assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config());
    }

    #[test]
    fn a_nic_has_a_vhost_descriptor_per_queue_or_none_and_then_no_limits() {
        use crate::rate::{Bucket, RateLimit};
        let refused = |taps: usize, vhost: usize, limited: bool| {
            let names = |what: &str, count: usize| (0..count).map(|n| format!("{what}{n}")).collect();
            let mut config = config();
            let operations = Some(Bucket { size: 1, burst: 0, refill_ms: 1 });
            let limit = limited.then_some(RateLimit { bytes: None, operations });
            let nic = NicConfig {
                id: "nic0".into(),
                tap: "tap".into(),
                more_taps: names("tap", taps - 1),
                vhost: names("vhost", vhost),
                mac: MacAddr([2; 6]),
                mtu: 1500,
                receive_limit: None,
                send_limit: limit,
            };
            for (number, name) in (10..).zip(nic.more_taps.iter().chain(&nic.vhost).chain([&nic.tap])) {
                config.descriptors.insert(name.clone(), number);
            }
            config.nics.push(nic);
            config.validate().map_err(|error| error.field)
        };
        assert_eq!(refused(1, 0, true), Ok(()));
        assert_eq!(refused(8, 8, false), Ok(()));
        assert_eq!(refused(9, 0, false), Err("nics[0].more_taps".into()));
        assert_eq!(refused(2, 1, false), Err("nics[0].vhost".into()));
        assert_eq!(refused(1, 2, false), Err("nics[0].vhost".into()));
        assert_eq!(refused(2, 2, true), Err("nics[0].send_limit".into()));
    }

    #[test]
    fn each_refusal_names_its_field() {
        assert_eq!(refused(|c| c.vcpus = 0), "vcpus");
        assert_eq!(refused(|c| c.vcpus = 33), "vcpus");
        assert_eq!(refused(|c| c.memory_mib = 1), "memory_mib");
        assert_eq!(refused(|c| c.cmdline = "a".repeat(2048)), "cmdline");
        assert_eq!(refused(|c| c.cmdline = "a\nb".into()), "cmdline");
        assert_eq!(refused(|c| c.disks[0].id = "a b".into()), "disks[0].id");
        assert_eq!(refused(|c| c.disks[0].backing = "kernel".into()), "disks[0].backing");
        assert_eq!(refused(|c| c.disks[0].backing = "absent".into()), "disks[0].backing");
        assert_eq!(refused(|c| c.disks.clear()), "descriptors.disk-root");
        assert_eq!(refused(|c| c.disks[0].serial = Some("x".repeat(21))), "disks[0].serial");
        let empty = Some(Bucket { size: 0, burst: 1, refill_ms: 1 });
        assert_eq!(refused(|c| c.disks[0].limit.bytes = empty), "disks[0].limit.bytes.size");
        assert_eq!(refused(|c| c.rng_limit.operations = empty), "rng_limit.operations.size");
        let pmem = |id: &str| PmemConfig { id: id.into(), backing: "p".into(), read_only: true };
        assert_eq!(refused(|c| c.pmem = vec![pmem("root")]), "pmem[0].id");
        assert_eq!(refused(|c| c.pmem = vec![pmem("data")]), "pmem[0].backing");
        assert_eq!(refused(|c| c.pmem = vec![pmem("x"); PMEMS_MAX + 1]), "pmem");
        let balloon = BalloonConfig { target_mib: 128, ..BalloonConfig::default() };
        assert_eq!(refused(|c| c.balloon = Some(balloon)), "balloon.target_mib");
        assert_eq!(refused(|c| c.descriptors.insert("kvm".into(), 1).map_or((), |_| ())), "descriptors.kvm");
        assert_eq!(refused(|c| c.descriptors.insert("kvm".into(), 4).map_or((), |_| ())), "descriptors.kvm");
    }

    #[test]
    fn an_unknown_field_is_refused_with_its_name() {
        let mut value = serde_json::to_value(config()).unwrap();
        value["vcpu"] = 1.into();
        let error = serde_json::from_value::<VmConfig>(value).unwrap_err();
        assert!(error.to_string().contains("`vcpu`"), "{error}");
    }
}
