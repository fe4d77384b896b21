//! The developer front end: paths on the command line become open descriptors and the same configuration an agent sends.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};

use blixard_vmm::descriptors::Descriptors;
use blixard_vmm::snapshot::file::State;
use blixard_vmm::snapshot::sections::Machine;
use blixard_vmm_api::config::{
    BalloonConfig, ConsoleConfig, DiskConfig, MacAddr, NicConfig, PmemConfig, VsockConfig,
};
use blixard_vmm_api::cpu::CpuBaseline;
use blixard_vmm_api::guest::GuestConfig;
use blixard_vmm_api::rate::RateLimit;
use blixard_vmm_api::snapshot::{MemoryConfig, Paging, RestoreConfig, SnapshotFiles};
use blixard_vmm_api::{ExitReason, VmConfig, VmId};

/// What the command line says.
#[derive(Debug, Default, Clone)]
pub struct Options {
    kernel: Option<String>,
    initramfs: Option<String>,
    cmdline: String,
    vcpus: u8,
    memory: u32,
    disks: Vec<(String, bool)>,
    pmems: Vec<(String, bool)>,
    balloon: Option<BalloonConfig>,
    taps: Vec<TapOption>,
    vsock: Option<(String, u32)>,
    rng: bool,
    control: Option<String>,
    boot_timer: bool,
    no_stdin: bool,
    log_syscalls: bool,
    /// State and memory files: what a diff is based on, oldest first, then the snapshot.
    snapshots: Vec<(String, String)>,
    paging: Paging,
    working_set: Option<String>,
    clock_went_on: bool,
    paused: bool,
    memory_options: MemoryConfig,
    /// Path of a baseline.
    cpu: Option<String>,
    /// Path of what `blixard-init` is told.
    guest: Option<String>,
}

/// The opened files of a snapshot, state and memory, after those of what it is based on.
pub type Snapshots = Vec<(OwnedFd, OwnedFd)>;

impl Options {
    /// Reads the words behind `run`.
    ///
    /// # Errors
    /// The word that is wrong, and why.
    pub fn parse(words: &[&str]) -> Result<Self, String> {
        let cmdline = "console=ttyS0 reboot=k panic=-1".to_owned();
        let mut options = Self { vcpus: 1, memory: 128, cmdline, ..Self::default() };
        let mut words = words.iter();
        let mut bases = 0;
        while let Some(word) = words.next() {
            let mut value =
                || words.next().map(|w| (*w).to_owned()).ok_or(format!("{word}: value is missing"));
            match *word {
                "--kernel" => options.kernel = Some(value()?),
                "--initramfs" => options.initramfs = Some(value()?),
                "--cmdline" => options.cmdline = value()?,
                "--vcpus" => options.vcpus = number(word, &value()?)?,
                "--memory" => options.memory = number(word, &value()?)?,
                "--disk" => options.disks.push(path_and_mode(&value()?)),
                "--pmem" => options.pmems.push(path_and_mode(&value()?)),
                "--balloon" => options.balloon = Some(balloon(word, &value()?)?),
                "--tap" => options.taps.push(TapOption::parse(word, &value()?)?),
                "--vsock" => {
                    let text = value()?;
                    let (path, cid) = text.rsplit_once(',').ok_or(format!("{word}: PATH,CID is needed"))?;
                    options.vsock = Some((path.to_owned(), number(word, cid)?));
                }
                "--restore" | "--base" => {
                    let text = value()?;
                    let files = text.split_once(',').ok_or(format!("{word}: STATE,MEMORY is needed"))?;
                    let files = (files.0.to_owned(), files.1.to_owned());
                    // A base comes before the snapshot, wherever it is named.
                    let at = if *word == "--base" { bases } else { options.snapshots.len() };
                    bases += usize::from(*word == "--base");
                    options.snapshots.insert(at, files);
                }
                "--cpu" => options.cpu = Some(value()?),
                "--guest" => options.guest = Some(value()?),
                "--userfault" => options.paging = Paging::Userfault,
                "--working-set" => options.working_set = Some(value()?),
                "--clock-went-on" => options.clock_went_on = true,
                "--paused" => options.paused = true,
                "--track-writes" => options.memory_options.track_writes = true,
                "--huge-pages" => options.memory_options.huge_pages = true,
                "--thp" => options.memory_options.transparent_huge_pages = true,
                "--merge" => options.memory_options.merge = true,
                "--fork-ready" => options.memory_options.fork_ready = true,
                "--rng" => options.rng = true,
                "--control" => options.control = Some(value()?),
                "--boot-timer" => options.boot_timer = true,
                "--no-stdin" => options.no_stdin = true,
                "--log-syscalls" => options.log_syscalls = true,
                _ => return Err(format!("{word}: no such option")),
            }
        }
        match (&options.kernel, options.snapshots.len() - bases) {
            (None, 1) | (Some(_), 0) if options.kernel.is_none() || bases == 0 => Ok(options),
            (None, 0) => Err("--kernel or --restore is missing".into()),
            _ => Err("either --kernel, or one --restore with its --base".into()),
        }
    }

    /// Whether what is typed goes to the guest.
    pub fn reads_stdin(&self) -> bool {
        !self.no_stdin
    }

    /// Whether forbidden system calls are only logged.
    pub fn log_syscalls(&self) -> bool {
        self.log_syscalls
    }

    /// Reads the words behind `fork`: what children of a running VM are given.
    ///
    /// # Errors
    /// The word that is wrong, and why.
    pub fn parse_for_fork(words: &[&str]) -> Result<Self, String> {
        // The descriptors come from the VM; the names are never opened.
        Self::parse(&[words, &["--restore", "-,-"]].concat())
    }

    /// The same options for child `number`: sockets get its number behind their name.
    pub fn for_child(&self, number: usize) -> Self {
        let name = |path: &String| format!("{path}.{number}");
        Self {
            control: self.control.as_ref().map(name),
            vsock: self.vsock.as_ref().map(|(path, cid)| (name(path), *cid)),
            ..self.clone()
        }
    }

    /// Opens everything.
    ///
    /// # Errors
    /// What cannot be opened, or is refused by the configuration.
    pub fn open(&self) -> Result<(VmConfig, Descriptors), ExitReason> {
        let mut snapshots = vec![];
        for (state, memory) in &self.snapshots {
            snapshots.push((open(state, true)?, open(memory, true)?));
        }
        let config = self.open_with(snapshots)?;
        // SAFETY: `open_with` gave up ownership of these descriptors, which are distinct.
        let given = unsafe { Descriptors::inherit(&config.descriptors) };
        given
            .map(|given| (config, given))
            .map_err(|error| ExitReason::Internal { detail: blixard_vmm::chain(&error) })
    }

    /// Opens everything but the files of snapshots. Who gets the configuration owns its descriptors.
    ///
    /// # Errors
    /// What cannot be opened, or is refused by the configuration.
    pub fn open_with(&self, snapshots: Snapshots) -> Result<VmConfig, ExitReason> {
        let mut opened = Opened::default();
        if self.no_stdin {
            let null = open("/dev/null", true)?;
            // SAFETY: both descriptors are open; standard input then refers to /dev/null.
            unsafe { libc::dup2(null.as_raw_fd(), libc::STDIN_FILENO) };
        }
        let kvm = open("/dev/kvm", false).map_err(|reason| match reason {
            ExitReason::BadConfig { detail } => ExitReason::HostProblem { detail },
            other => other,
        })?;
        let mut config = VmConfig {
            vm: VmId::from_u128(1),
            vcpus: self.vcpus,
            memory_mib: self.memory,
            kvm: opened.keep("kvm", kvm),
            kernel: String::new(),
            initramfs: None,
            cmdline: self.cmdline.clone(),
            guest: self.guest.as_deref().map(json::<GuestConfig>).transpose()?,
            disks: vec![],
            nics: vec![],
            vsock: None,
            pmem: vec![],
            rng: self.rng,
            rng_limit: RateLimit::default(),
            balloon: self.balloon.clone(),
            console: ConsoleConfig { stdio: true, ..ConsoleConfig::default() },
            control: None,
            exit_record: None,
            boot_timer: self.boot_timer,
            memory: self.memory_options,
            cpu: self.cpu.as_deref().map(json::<CpuBaseline>).transpose()?,
            restore: None,
            descriptors: BTreeMap::new(),
        };
        if let Some(path) = &self.kernel {
            config.kernel = opened.keep("kernel", open(path, true)?);
        }
        self.restore(&mut config, snapshots, &mut opened)?;
        if let Some(path) = &self.initramfs {
            config.initramfs = Some(opened.keep("initramfs", open(path, true)?));
        }
        for (number, (path, read_only)) in self.disks.iter().enumerate() {
            let backing = opened.keep(&format!("disk{number}"), open(path, *read_only)?);
            let (id, limit) = (format!("disk{number}"), RateLimit::default());
            config.disks.push(DiskConfig { id, serial: None, backing, read_only: *read_only, limit });
        }
        for (number, (path, read_only)) in self.pmems.iter().enumerate() {
            let backing = opened.keep(&format!("pmem{number}"), open(path, *read_only)?);
            config.pmem.push(PmemConfig { id: format!("pmem{number}"), backing, read_only: *read_only });
        }
        for (number, tap) in (0u8..).zip(&self.taps) {
            config.nics.push(tap.open(number, &mut opened)?);
        }
        if let Some((path, cid)) = &self.vsock {
            let listener =
                listen(path, libc::SOCK_STREAM).map_err(|e| host(&format!("--vsock {path}"), &e))?;
            config.vsock =
                Some(VsockConfig { cid: *cid, listener: opened.keep("vsock", listener), hook: None });
        }
        if let Some(path) = &self.control {
            let listener =
                listen(path, libc::SOCK_SEQPACKET).map_err(|e| host(&format!("--control {path}"), &e))?;
            config.control = Some(opened.keep("control", listener));
        }
        config.descriptors = opened.numbers();
        config.validate().map_err(|error| ExitReason::BadConfig { detail: error.to_string() })?;
        Ok(config)
    }

    fn restore(
        &self,
        config: &mut VmConfig,
        snapshots: Snapshots,
        opened: &mut Opened,
    ) -> Result<(), ExitReason> {
        let mut files = vec![];
        for (number, (state, memory)) in snapshots.into_iter().enumerate() {
            let state = File::from(state);
            let machine = State::read_from(&state).and_then(|mut s| s.take("machine", Machine::restore));
            let machine = machine.map_err(|e| ExitReason::BadConfig { detail: blixard_vmm::chain(&e) })?;
            config.vcpus = machine.vcpus;
            config.memory_mib = u32::try_from(machine.memory >> 20).unwrap_or(u32::MAX);
            let state = opened.keep(&format!("state{number}"), state.into());
            files.push(SnapshotFiles { state, memory: opened.keep(&format!("memory{number}"), memory) });
        }
        let Some(snapshot) = files.pop() else { return Ok(()) };
        let working_set = match &self.working_set {
            Some(path) => Some(opened.keep("working-set", open(path, true)?)),
            None => None,
        };
        let userfaultfd = match self.paging {
            Paging::Userfault => Some(opened.keep("userfaultfd", open("/dev/userfaultfd", false)?)),
            Paging::Map => None,
        };
        config.restore = Some(RestoreConfig {
            snapshot,
            bases: files,
            paging: self.paging,
            userfaultfd,
            working_set,
            clock_went_on: self.clock_went_on,
            paused: self.paused,
        });
        Ok(())
    }
}

/// `PATH` or `PATH,ro`.
fn path_and_mode(text: &str) -> (String, bool) {
    let read_only = text.strip_suffix(",ro");
    (read_only.unwrap_or(text).to_owned(), read_only.is_some())
}

/// `MIB` with any of `,oom`, `,reporting`, `,hinting`, `,statistics=SECONDS`.
fn balloon(word: &str, text: &str) -> Result<BalloonConfig, String> {
    let mut parts = text.split(',');
    let target_mib = number(word, parts.next().unwrap_or_default())?;
    let mut config = BalloonConfig { target_mib, ..BalloonConfig::default() };
    for part in parts {
        match part.split_once('=') {
            None if part == "oom" => config.deflate_on_oom = true,
            None if part == "reporting" => config.free_page_reporting = true,
            None if part == "hinting" => config.free_page_hinting = true,
            Some(("statistics", seconds)) => config.statistics_s = number(word, seconds)?,
            _ => return Err(format!("{word}: {part}: no such thing")),
        }
    }
    Ok(config)
}

fn number<N: std::str::FromStr>(word: &str, text: &str) -> Result<N, String> {
    text.parse().map_err(|_| format!("{word}: {text} is no number that is possible here"))
}

fn host(what: &str, error: &io::Error) -> ExitReason {
    ExitReason::HostProblem { detail: format!("{what}: {error}") }
}

/// What a file says as JSON.
fn json<T: serde::de::DeserializeOwned>(path: &str) -> Result<T, ExitReason> {
    let text = std::fs::read(path).map_err(|error| error.to_string());
    let read = text.and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()));
    read.map_err(|error| ExitReason::BadConfig { detail: format!("{path}: {error}") })
}

/// A TAP on the command line: `NAME[,QUEUES][,vhost]`.
#[derive(Debug, Clone)]
struct TapOption {
    name: String,
    queues: u8,
    vhost: bool,
}

impl TapOption {
    fn parse(word: &str, text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default().to_owned();
        let mut tap = Self { name, queues: 1, vhost: false };
        for part in parts {
            match part {
                "vhost" => tap.vhost = true,
                queues => tap.queues = number::<u8>(word, queues)?.max(1),
            }
        }
        Ok(tap)
    }

    fn open(&self, number: u8, opened: &mut Opened) -> Result<NicConfig, ExitReason> {
        let mut taps = vec![];
        let mut vhost = vec![];
        for queue in 0..self.queues {
            let fd = tap(&self.name, self.queues > 1);
            let fd = fd.map_err(|error| host(&format!("--tap {}", self.name), &error))?;
            taps.push(opened.keep(&format!("tap{number}-{queue}"), fd));
            if self.vhost {
                vhost.push(opened.keep(&format!("vhost{number}-{queue}"), open("/dev/vhost-net", false)?));
            }
        }
        Ok(NicConfig {
            id: format!("nic{number}"),
            tap: taps.remove(0),
            more_taps: taps,
            vhost,
            mac: MacAddr([0x52, 0x54, 0, 0, 0, number]),
            mtu: 1500,
            receive_limit: None,
            send_limit: None,
        })
    }
}

/// What was opened, by name.
#[derive(Default)]
struct Opened(BTreeMap<String, OwnedFd>);

impl Opened {
    fn keep(&mut self, name: &str, fd: OwnedFd) -> String {
        self.0.insert(name.to_owned(), fd);
        name.to_owned()
    }

    /// Gives ownership up to whoever takes the numbers.
    fn numbers(self) -> BTreeMap<String, i32> {
        self.0.into_iter().map(|(name, fd)| (name, fd.into_raw_fd())).collect()
    }
}

fn open(path: &str, read_only: bool) -> Result<OwnedFd, ExitReason> {
    let opened: io::Result<File> = OpenOptions::new().read(true).write(!read_only).open(path);
    opened.map(OwnedFd::from).map_err(|error| ExitReason::BadConfig { detail: format!("{path}: {error}") })
}

/// A listening Unix socket of this kind. What an earlier run left at the path is replaced.
fn listen(path: &str, kind: i32) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let mut address = libc::sockaddr_un { sun_family: 1, sun_path: [0; 108] };
    if path.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(path.bytes()) {
        *to = from.cast_signed();
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // SAFETY: no pointers are involved.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).unwrap_or(0);
    // SAFETY: the pointer is to an address of that size.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no pointers are involved.
    if unsafe { libc::listen(socket.as_raw_fd(), 16) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// A queue of the TAP `name`; of several when it has more of them.
fn tap(name: &str, several: bool) -> io::Result<OwnedFd> {
    const TUNSETIFF: libc::c_int = 0x4004_54CA;
    const TUNSETVNETHDRSZ: libc::c_int = 0x4004_54D8;
    /// Frames, no packet information, virtio-net header.
    const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;
    const IFF_MULTI_QUEUE: u16 = 0x0100;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = [0u8; 40];
    if name.len() >= 16 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let flags = if several { FLAGS | IFF_MULTI_QUEUE } else { FLAGS };
    for (to, from) in request.iter_mut().skip(16).zip(flags.to_le_bytes()) {
        *to = from;
    }
    // SAFETY: the pointer is to 40 bytes, the size of an ifreq.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let header: libc::c_int = 12;
    // SAFETY: the pointer is to an int.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const header) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}
