//! From a VM's plan to a running VMM: its configuration, its descriptors in order, its jail.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use blixard_agent_api::VmPlan;
use blixard_agent_api::plan::NicPlan;
use blixard_vmm_api::VmConfig;
use blixard_vmm_api::config::{ConfigError, ConsoleConfig, DiskConfig, NicConfig, VsockConfig};
use blixard_vmm_api::guest::{GuestConfig, NicAddresses, RootConfig};
use blixard_vmm_api::rate::RateLimit;
use blixard_vmm_api::snapshot::MemoryConfig;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

use crate::durable;
use crate::jail::{self, FIRST_DESCRIPTOR, JailError, Jailed, Order, Program};
use crate::record::Slot;

/// Words of every guest kernel's command line.
///
/// * `console=ttyS0 quiet loglevel=4`: warnings and worse on the serial console; each byte there is an exit to the VMM.
/// * `panic=-1 oops=panic`: a guest kernel that failed resets at once, so its VM ends instead of hanging half alive.
/// * `reboot=a`: a reset writes the ACPI reset register. Left to choose, Linux calls EFI on hardware-reduced ACPI, also where
///   there is none, and hangs (`reboot_init`, arch/x86/kernel/reboot.c).
/// * `tsc=reliable no_timer_check`: the clock and timer of a VM need no measuring.
/// * `cryptomgr.notests random.trust_cpu=on`: no self-tests at boot; entropy from the processor at once.
/// * `8250.nr_uarts=1`: no probing of serial ports that are not there.
/// * `pci=lastbus=0`: one root bus.
///
/// Nothing about the keyboard controller: ACPI says that there is none, and `i8042.nopnp` would make the kernel probe it.
pub const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic reboot=a tsc=reliable no_timer_check cryptomgr.notests \
     random.trust_cpu=on 8250.nr_uarts=1 pci=lastbus=0";
/// Below this much memory in MiB a guest kernel gets [`SMALL_CMDLINE`] too.
const SMALL_MIB: u32 = 96;
/// More words for a guest that is hardly larger than its kernel.
///
/// `initcall_blacklist=tracer_init_tracefs`: no files for trace events, which take 9 MiB before init runs. With them Debian's
/// cloud kernel 6.1, which occupies 46 MiB, panics for lack of memory in a guest of 64 MiB.
const SMALL_CMDLINE: &str = " initcall_blacklist=tracer_init_tracefs";
/// Size at which the console log starts anew, in bytes.
pub const CONSOLE_LOG_BYTES_MAX: u64 = 8 << 20;
/// Context id of the VM in slot 0: 0 to 2 are taken (virtio 1.3 section 5.10.4).
const FIRST_CID: u32 = 3;
/// Disk id and serial number of the image.
const IMAGE_DISK: &str = "root";
/// Disk id and serial number of the volume.
const VOLUME_DISK: &str = "volume";

/// Names of the sockets in a VM's folder.
pub const CONTROL_SOCKET: &str = "control.sock";
/// See [`CONTROL_SOCKET`].
pub const CONSOLE_SOCKET: &str = "console.sock";
/// See [`CONTROL_SOCKET`].
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// Names of the files in a VM's folder.
pub const CONSOLE_LOG: &str = "console.log";
/// See [`CONSOLE_LOG`].
pub const EXIT_RECORD: &str = "exit.json";

/// Why a VMM was not started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The plan makes no configuration.
    #[error("the plan cannot be run")]
    Config(#[source] ConfigError),
    /// The configuration cannot be written.
    #[error("cannot encode the configuration")]
    Encode(#[source] serde_json::Error),
    /// Something cannot be opened or made.
    #[error("cannot {operation}")]
    Open {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The jail failed.
    #[error("cannot start the VMM")]
    Jail(#[source] JailError),
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl Fn(E) -> LaunchError {
    move |source| LaunchError::Open { operation, source: source.into() }
}

/// The configuration of a plan, with descriptors numbered from [`FIRST_DESCRIPTOR`] in the order of the answer's second part.
///
/// # Errors
/// The first field that is not possible.
pub fn config(plan: &VmPlan, slot: Slot, mtu: u16) -> Result<(VmConfig, Vec<&'static str>), ConfigError> {
    let mut names =
        vec!["kvm", "kernel", "initramfs", "control", "exit-record", "console-log", "console", "vsock"];
    names.extend(["disk-root", "disk-volume"]);
    names.extend(plan.nic.is_some().then_some("nic-0"));
    let numbers: BTreeMap<String, i32> =
        (FIRST_DESCRIPTOR..).zip(&names).map(|(number, name)| ((*name).to_owned(), number)).collect();
    let disk = |id: &str, backing: &str, read_only| DiskConfig {
        id: id.into(),
        serial: None,
        backing: backing.into(),
        read_only,
        limit: RateLimit::default(),
    };
    let addresses = |nic: &NicPlan| NicAddresses {
        mac: nic.spec.mac,
        addresses: nic.addresses.clone(),
        gateways: nic.gateways.clone(),
        mtu,
    };
    let small = if plan.memory_mib < SMALL_MIB { SMALL_CMDLINE } else { "" };
    let separator = if plan.cmdline.is_empty() { "" } else { " " };
    let config = VmConfig {
        vm: plan.vm,
        vcpus: plan.vcpus,
        memory_mib: plan.memory_mib,
        kvm: "kvm".into(),
        kernel: "kernel".into(),
        initramfs: Some("initramfs".into()),
        cmdline: format!("{CMDLINE}{small}{separator}{}", plan.cmdline),
        guest: Some(GuestConfig {
            hostname: plan.name.clone(),
            root: Some(RootConfig {
                image_disk: IMAGE_DISK.into(),
                image_fs: plan.image_fs.clone(),
                volume_disk: Some(VOLUME_DISK.into()),
            }),
            nics: plan.nic.iter().map(addresses).collect(),
            resolvers: plan.resolvers.clone(),
            workload: plan.workload.clone(),
            health: plan.health.clone(),
        }),
        disks: vec![disk(IMAGE_DISK, "disk-root", true), disk(VOLUME_DISK, "disk-volume", false)],
        nics: plan
            .nic
            .iter()
            .map(|nic| NicConfig {
                id: "nic0".into(),
                tap: "nic-0".into(),
                more_taps: vec![],
                vhost: vec![],
                mac: nic.spec.mac,
                mtu,
                receive_limit: None,
                send_limit: None,
            })
            .collect(),
        vsock: Some(VsockConfig {
            cid: FIRST_CID.saturating_add(slot),
            listener: "vsock".into(),
            hook: None,
        }),
        pmem: vec![],
        rng: true,
        rng_limit: RateLimit::default(),
        balloon: None,
        console: ConsoleConfig {
            log: Some("console-log".into()),
            log_bytes_max: CONSOLE_LOG_BYTES_MAX,
            listener: Some("console".into()),
            stdio: false,
        },
        control: Some("control".into()),
        exit_record: Some("exit-record".into()),
        boot_timer: false,
        // Also where the host gives them only to those who ask: with them a kernel takes far fewer faults while it starts.
        memory: MemoryConfig { transparent_huge_pages: true, ..MemoryConfig::default() },
        cpu: None,
        restore: None,
        descriptors: numbers,
    };
    config.validate()?;
    Ok((config, names))
}

/// What a launch needs besides the plan.
#[derive(Debug)]
pub struct Resources<'a> {
    /// The VMM's program.
    pub program: &'a Program,
    /// Folder of the VM's sockets.
    pub sockets: &'a Path,
    /// Folder of the VM's files.
    pub files: &'a Path,
    /// Folder on which the empty root is mounted.
    pub root: &'a Path,
    /// The VM's slot.
    pub slot: Slot,
    /// The VM's uid.
    pub identity: u32,
    /// Its cgroup, if any.
    pub cgroup: Option<OwnedFd>,
    /// Kernel, initial RAM file system, image: open for reading.
    pub content: [OwnedFd; 3],
    /// The volume, open for writing.
    pub volume: OwnedFd,
    /// The TAP, when the plan has a nic.
    pub tap: Option<OwnedFd>,
    /// Largest packet of the nic's network in bytes.
    pub mtu: u16,
}

/// Starts the VMM of a plan.
///
/// # Errors
/// See [`LaunchError`]; no process is left then.
pub fn launch(plan: &VmPlan, resources: Resources) -> Result<Jailed, LaunchError> {
    let (config, names) = config(plan, resources.slot, resources.mtu).map_err(LaunchError::Config)?;
    let config = serde_json::to_vec(&config).map_err(LaunchError::Encode)?;
    let [kernel, initramfs, image] = resources.content;
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(failed("open /dev/kvm"))?;
    let mut descriptors: Vec<OwnedFd> = vec![
        kvm.into(),
        kernel,
        initramfs,
        listener(&resources.sockets.join(CONTROL_SOCKET), SockType::SeqPacket)?,
        exit_record(&resources.files.join(EXIT_RECORD))?.into(),
        console_log(&resources.files.join(CONSOLE_LOG))?.into(),
        listener(&resources.sockets.join(CONSOLE_SOCKET), SockType::Stream)?,
        listener(&resources.sockets.join(VSOCK_SOCKET), SockType::Stream)?,
        image,
        resources.volume,
    ];
    descriptors.extend(resources.tap);
    if descriptors.len() != names.len() {
        return Err(failed("hand over the TAP")(io::Error::from(io::ErrorKind::NotFound)));
    }
    descriptors.push(jail::sealed("config", &config).map_err(LaunchError::Jail)?);
    let number = FIRST_DESCRIPTOR.saturating_add(i32::try_from(names.len()).unwrap_or(i32::MAX));
    let words = ["blixard-vmm".into(), "--config-fd".into(), number.to_string()];
    let order = Order {
        program: resources.program,
        arguments: words.into_iter().filter_map(|word| CString::new(word).ok()).collect(),
        cgroup: resources.cgroup.as_ref().map(AsFd::as_fd),
        root: resources.root,
        identity: resources.identity,
        descriptors: descriptors.iter().map(AsFd::as_fd).collect(),
    };
    jail::start(&order).map_err(LaunchError::Jail)
}

/// A listening socket at `path`, for root only. What lies there from an earlier start is replaced.
fn listener(path: &Path, kind: SockType) -> Result<OwnedFd, LaunchError> {
    let wrong = failed::<Errno>("listen at a socket of the VM");
    durable::remove_file(path).map_err(failed("remove a socket of the VM"))?;
    let fd = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).map_err(&wrong)?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path).map_err(&wrong)?).map_err(&wrong)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed("protect a socket"))?;
    listen(&fd, Backlog::new(16).map_err(&wrong)?).map_err(&wrong)?;
    Ok(fd)
}

fn console_log(path: &Path) -> Result<File, LaunchError> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600);
    options.open(path).map_err(failed("open the console log"))
}

fn exit_record(path: &Path) -> Result<File, LaunchError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true).mode(0o600);
    options.open(path).map_err(failed("make the exit record"))
}
