//! One emulated host: a QEMU process with two disks, two network cards and four slots for shared folders.

use crate::accel::Accel;
use crate::leash::{self, Leash, Running};
use crate::qcow2::{self, Base};
use crate::qmp::{self, Qmp};
use crate::{programs, recipe, shell};
use serde_json::json;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Shared folders one host can have. The devices are always there, so that one snapshot fits all.
pub const MAX_SHARES: usize = 4;
/// Hosts on the private segment.
pub const MAX_HOSTS: u8 = 3;

/// How often a host that no longer answers is asked where its processors are.
const SAMPLES: usize = 6;
/// The flag of a processor that takes interrupts (EFLAGS.IF).
const INTERRUPTS: u64 = 1 << 9;
/// Time between two of these questions.
const BETWEEN_SAMPLES: Duration = Duration::from_millis(300);
/// How long a host that no longer answers may take to tell where it is.
const AUTOPSY: Duration = Duration::from_secs(10);

const KERNEL_LINE: &str = "console=ttyS0 net.ifnames=0 mitigations=off nokaslr tsc=reliable no_timer_check \
    cryptomgr.notests apparmor=0 quiet panic=-1";

/// What can go wrong with a host.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the host could not be made or read.
    #[error("cannot prepare {path}")]
    File {
        /// The file.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A disk could not be made.
    #[error("cannot make a disk")]
    Disk(#[from] qcow2::Error),
    /// QEMU could not be started.
    #[error("cannot start a host")]
    Start(#[source] leash::Error),
    /// The end of QEMU could not be awaited.
    #[error("cannot end a host")]
    End(#[source] leash::Error),
    /// QEMU ended, refused a command or spoke nonsense.
    #[error("{host} failed ({log})")]
    Talk {
        /// Name of the host.
        host: String,
        /// The last words of QEMU and of the host's console.
        log: String,
        /// The cause.
        #[source]
        source: qmp::Error,
    },
    /// QEMU did not tell the port of the control connection.
    #[error("QEMU does not forward the control connection")]
    NoPort,
}

/// What a snapshot fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Virtual processors.
    pub cpus: u8,
    /// Memory in MiB.
    pub mem: u32,
}

/// A folder of this machine that hosts see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Here.
    pub folder: PathBuf,
    /// There, absolute.
    pub target: String,
}

/// Memory and disk to start from.
pub enum Origin<'a> {
    /// Boots the image; memory is this new file, shared, so that it can become a snapshot.
    Boot(&'a Path),
    /// Continues a snapshot: memory and disk are used copy-on-write.
    Snapshot(&'a Path),
}

/// Everything that is the same for all hosts of a run.
pub struct Plan<'a> {
    /// Accelerator.
    pub accel: &'a Accel,
    /// Processors and memory.
    pub shape: &'a Shape,
    /// Folder of the image.
    pub image: &'a Path,
    /// Shared folders.
    pub shares: &'a [Share],
    /// Socket of the network switch.
    pub switch: Option<&'a Path>,
}

/// A running host. Dropping it kills QEMU.
pub struct Host {
    /// Number on the segment, from 0.
    pub index: u8,
    folder: PathBuf,
    process: Running,
    socket: Option<UnixStream>,
    qmp: Option<Qmp>,
}

/// How a host was found.
pub struct Autopsy {
    /// A processor runs and stays at one instruction.
    pub hung: bool,
    /// For people.
    pub text: String,
}

/// Where a host's own socket on the segment is.
pub fn port(folder: &Path) -> PathBuf {
    folder.join("lan")
}

impl Plan<'_> {
    /// What state in a snapshot depends on, apart from the contents of files.
    pub fn fingerprint(&self) -> String {
        let plain =
            Plan { accel: self.accel, shape: self.shape, image: self.image, shares: &[], switch: None };
        let nowhere = Path::new("");
        plain.args(nowhere, &Origin::Boot(nowhere)).join(" ")
    }

    fn args(&self, folder: &Path, origin: &Origin<'_>) -> Vec<String> {
        let file = |path: &Path| shell::qemu(&path.to_string_lossy());
        let (ram, share) = match origin {
            Origin::Boot(ram) => (file(ram), "on"),
            // No reservation: three large hosts fit a small machine as long as they do not use it all.
            Origin::Snapshot(snapshot) => (file(&snapshot.join("ram")), "off,reserve=off"),
        };
        let (cpus, mem) = (self.shape.cpus, self.shape.mem);
        let (cpus, line) = if self.accel.emulated {
            (cpus.saturating_add(1), format!("{KERNEL_LINE} isolcpus=0"))
        } else {
            (cpus, KERNEL_LINE.to_owned())
        };
        let mut args: Vec<String> = "-nodefaults -no-user-config -display none -vga none"
            .split(' ')
            .chain(self.accel.args)
            .map(str::to_owned)
            .collect();
        let mut add = |option: &str, value: String| args.extend([option.to_owned(), value]);
        add("-smp", cpus.to_string());
        add("-m", format!("{mem}M"));
        add("-machine", "q35,memory-backend=ram,vmport=off".into());
        add("-object", format!("memory-backend-file,id=ram,size={mem}M,mem-path={ram},share={share}"));
        add("-kernel", self.image.join("kernel").to_string_lossy().into_owned());
        add("-initrd", self.image.join("initramfs").to_string_lossy().into_owned());
        add("-append", line);
        for (id, format) in [("root", "qcow2"), ("scratch", "raw")] {
            let file = file(&folder.join(id));
            add("-drive", format!("if=none,id={id},format={format},file={file},cache=unsafe,discard=unmap"));
            add("-device", format!("virtio-blk-pci,drive={id},serial={id}"));
        }
        add("-netdev", "user,id=control,hostfwd=tcp:127.0.0.1:0-:22".into());
        add("-device", "virtio-net-pci,netdev=control,romfile=".into());
        add(
            "-netdev",
            match self.switch {
                None => "hubport,id=segment,hubid=1".into(),
                Some(switch) => format!(
                    "dgram,id=segment,local.type=unix,local.path={},remote.type=unix,remote.path={}",
                    file(&port(folder)),
                    file(switch)
                ),
            },
        );
        add("-device", "virtio-net-pci,netdev=segment,romfile=".into());
        add("-device", "virtio-rng-pci".into());
        add("-device", "vmgenid,guid=auto".into()); // makes a restored kernel renew its random numbers
        add("-serial", format!("file:{}", file(&folder.join("console"))));
        for slot in 0..MAX_SHARES {
            let path = file(self.shares.get(slot).map_or(folder, |share| &share.folder));
            add("-fsdev", format!("local,id=share{slot},path={path},security_model=none,multidevs=remap"));
            add("-device", format!("virtio-9p-pci,fsdev=share{slot},mount_tag=share{slot}"));
        }
        if matches!(origin, Origin::Snapshot(_)) {
            add("-incoming", "defer".into());
        }
        args
    }

    /// Starts QEMU in a new folder. It does not run before [`Host::resume`].
    pub fn start(&self, index: u8, folder: &Path, origin: &Origin<'_>, leash: &Leash) -> Result<Host, Error> {
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |source| Error::File { path, source }
        };
        fs::create_dir_all(folder).map_err(failed(folder))?;
        let (base, format) = match origin {
            Origin::Boot(_) => (self.image.join("root.ext4"), Base::Raw),
            Origin::Snapshot(snapshot) => (snapshot.join("root"), Base::Qcow2),
        };
        qcow2::create(&folder.join("root"), &base, format, recipe::ROOT_SIZE)?;
        let scratch = folder.join("scratch");
        File::create_new(&scratch)
            .and_then(|file| file.set_len(recipe::SCRATCH_SIZE))
            .map_err(failed(&scratch))?;
        let log = File::create(folder.join("qemu.log")).map_err(failed(folder))?;
        let (ours, theirs) = UnixStream::pair().map_err(failed(folder))?;
        let mut command = programs::command("qemu-system-x86_64");
        command.args(self.args(folder, origin));
        command.args(["-S", "-chardev", "socket,id=qmp,fd=0", "-mon", "chardev=qmp,mode=control"]);
        command.stdin(OwnedFd::from(theirs)).stdout(log.try_clone().map_err(failed(folder))?).stderr(log);
        let process = leash.start_host(&mut command).map_err(Error::Start)?;
        Ok(Host { index, folder: folder.to_owned(), process, socket: Some(ours), qmp: None })
    }
}

impl Host {
    /// Its name, as the other hosts know it.
    pub fn name(&self) -> String {
        format!("rig{}", self.index)
    }

    /// Its folder on this machine.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Restores the state of a snapshot, when it started from one, and lets the processors run.
    pub fn resume(&mut self, origin: &Origin<'_>) -> Result<(), Error> {
        if let Origin::Snapshot(snapshot) = origin {
            self.talk(|qmp| qmp.restore(&snapshot.join("state")))?;
        }
        self.talk(|qmp| qmp.ask("cont", json!({}))).map(drop)
    }

    /// Stops the processors and saves what a snapshot needs besides memory and disk, then ends QEMU.
    pub fn save(&mut self, state: &Path) -> Result<(), Error> {
        self.talk(|qmp| qmp.ask("stop", json!({})))?;
        self.talk(|qmp| qmp.save(state))?;
        // Closing the disks properly is what `quit` is for; its answer may get lost in the end of QEMU.
        _ = self.talk(|qmp| qmp.ask("quit", json!({})));
        self.process.wait().map(drop).map_err(Error::End)
    }

    /// The TCP port of 127.0.0.1 that leads to the host's ssh server.
    pub fn control_port(&mut self) -> Result<u16, Error> {
        let arguments = json!({ "command-line": "info usernet" });
        let table = self.talk(|qmp| qmp.ask("human-monitor-command", arguments))?;
        parse_port(table.as_str().unwrap_or_default()).ok_or(Error::NoPort)
    }

    /// Whether QEMU has ended.
    pub fn ended(&mut self) -> bool {
        self.process.ended()
    }

    /// The last words of QEMU and of the console.
    pub fn last_words(&self) -> String {
        let words = |name: &str| {
            last_words(&String::from_utf8_lossy(&fs::read(self.folder.join(name)).unwrap_or_default()))
        };
        format!("QEMU: {}\nconsole: {}", words("qemu.log"), words("console"))
    }

    /// How a host that no longer answers is: whether QEMU runs, where its processors are, and its last words.
    pub fn autopsy(&mut self) -> Autopsy {
        if self.ended() {
            return Autopsy { hung: false, text: format!("QEMU has ended\n{}", self.last_words()) };
        }
        let asked = self.talk(|qmp| {
            qmp.patience(Some(AUTOPSY))?;
            let mut samples = Vec::new();
            // Some time apart: a processor that hangs is where it was, one that is slow is not.
            for _ in 0..SAMPLES {
                let registers = json!({ "command-line": "info registers -a" });
                samples.push(qmp.ask("human-monitor-command", registers)?);
                std::thread::sleep(BETWEEN_SAMPLES);
            }
            Ok(samples)
        });
        let (hung, places) = match asked {
            Ok(samples) => {
                let samples: Vec<_> =
                    samples.iter().map(|text| places(text.as_str().unwrap_or_default())).collect();
                (hung(&samples), samples.concat())
            }
            Err(error) => (false, error.to_string()),
        };
        let how = if hung { "QEMU runs, a processor hangs" } else { "QEMU runs" };
        Autopsy { hung, text: format!("{how}\n{places}{}", self.last_words()) }
    }

    fn talk<T>(&mut self, talk: impl FnOnce(&mut Qmp) -> Result<T, qmp::Error>) -> Result<T, Error> {
        let result = match (&mut self.qmp, self.socket.take()) {
            (Some(qmp), _) => talk(qmp),
            (None, None) => Err(qmp::Error::Ended),
            (empty, Some(socket)) => Qmp::connect(socket).and_then(|qmp| talk(empty.insert(qmp))),
        };
        result.map_err(|source| Error::Talk { host: self.name(), log: self.last_words(), source })
    }
}

/// The last lines of a log, and all since a kernel's first complaint: its cause is there, not at the end.
fn last_words(log: &str) -> String {
    const LAST: usize = 15;
    const MOST: usize = 200;
    const COMPLAINTS: [&str; 5] =
        ["BUG: ", "Oops: ", "general protection fault", "Kernel panic", "WARNING: "];
    let lines: Vec<&str> = log.lines().collect();
    let complaint = lines.iter().position(|line| COMPLAINTS.iter().any(|word| line.contains(word)));
    let last = lines.len().saturating_sub(LAST);
    let from = complaint.map_or(last, |first| first.min(last));
    lines.into_iter().skip(from).take(MOST).collect::<Vec<_>>().join("\n")
}

/// Which processor is where, from `info registers -a`.
fn places(registers: &str) -> String {
    let wanted = |line: &&str| line.starts_with("CPU#") || line.contains("RIP=");
    registers.lines().filter(wanted).map(|line| format!("{}\n", line.trim())).collect()
}

/// Whether a processor was at the same instruction of the kernel in all samples of [`places`], not halted and with interrupts
/// off. A guest that loops has interrupts on or is interrupted by the host, and a wait for something has several instructions.
fn hung(samples: &[String]) -> bool {
    let Some((first, rest)) = samples.split_first() else { return false };
    let place = |line: &str| line.split_whitespace().next().unwrap_or_default().to_owned();
    let interrupts = |line: &str| {
        let flags = line.split_whitespace().find_map(|word| word.strip_prefix("RFL="));
        flags
            .and_then(|flags| u64::from_str_radix(flags, 16).ok())
            .is_none_or(|flags| flags & INTERRUPTS != 0)
    };
    let running = |line: &str| line.contains("RIP=ffffffff") && line.contains("HLT=0") && !interrupts(line);
    first.lines().enumerate().any(|(number, line)| {
        let same = |other: &String| {
            other.lines().nth(number).is_some_and(|other| running(other) && place(other) == place(line))
        };
        running(line) && !rest.is_empty() && rest.iter().all(same)
    })
}

/// Finds the forwarded port in the table of `info usernet`: protocol with state, descriptor, address, port, …
fn parse_port(table: &str) -> Option<u16> {
    let line = table.lines().find(|line| line.contains("HOST_FORWARD"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accel() -> Accel {
        Accel {
            args: ["-accel", "tcg", "-cpu", "max"],
            name: "tcg".into(),
            why: String::new(),
            emulated: true,
        }
    }

    #[test]
    fn the_forwarded_port_is_found() {
        let table = "Hub -1 (control):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port \
                     RecvQ SendQ\r\n  TCP[HOST_FORWARD]  14       127.0.0.1 41233       10.0.2.15    22     0     0\r\n";
        assert_eq!(parse_port(table), Some(41233));
        assert_eq!(parse_port("nothing"), None);
    }

    #[test]
    fn the_places_of_processors_are_found() {
        let registers = "\r\nCPU#0\r\nRAX=0 RBX=1\r\nRIP=ffffffff81000000 RFL=00000246\r\nES =0000\r\n";
        assert_eq!(places(registers), "CPU#0\nRIP=ffffffff81000000 RFL=00000246\n");
    }

    #[test]
    fn a_processor_that_runs_and_does_not_move_hangs() {
        let sample = |first: &str, second: &str| format!("CPU#0\n{first}\nCPU#1\n{second}\n");
        let (idle, busy) =
            ("RIP=ffffffff81000000 RFL=00000046 HLT=1", "RIP=ffffffff81000010 RFL=00000046 HLT=0");
        let elsewhere = "RIP=ffffffff81000020 RFL=00000046 HLT=0";
        let interruptible = "RIP=ffffffff81000010 RFL=00000246 HLT=0";
        let program = "RIP=0000000000400010 RFL=00000046 HLT=0";
        assert!(hung(&[sample(idle, busy), sample(idle, busy)]));
        assert!(!hung(&[sample(idle, busy), sample(idle, elsewhere)]));
        for fine in [idle, interruptible, program] {
            assert!(!hung(&[sample(idle, fine), sample(idle, fine)]), "{fine}");
        }
        assert!(!hung(&[sample(idle, busy)]) && !hung(&[]));
    }

    #[test]
    fn last_words_begin_with_the_first_complaint_of_a_kernel() {
        let quiet: String = (0..40).map(|n| format!("line {n}\n")).collect();
        assert_eq!(last_words(&quiet).lines().next(), Some("line 25"));
        let oops = format!("boot\n[1.0] BUG: unable to handle page fault\n{quiet}");
        assert_eq!(last_words(&oops).lines().next(), Some("[1.0] BUG: unable to handle page fault"));
        assert_eq!(last_words(&oops).lines().count(), 41);
        assert_eq!(last_words(""), "");
    }

    #[test]
    fn a_snapshot_depends_on_the_shape_and_not_on_what_is_shared() {
        let (accel, image) = (accel(), Path::new("/image"));
        let shape = Shape { cpus: 2, mem: 1024 };
        let plan = Plan { accel: &accel, shape: &shape, image, shares: &[], switch: None };
        let share = [Share { folder: "/x".into(), target: "/y".into() }];
        let shared = Plan { shares: &share, switch: Some(Path::new("/s")), ..plan };
        assert_eq!(plan.fingerprint(), shared.fingerprint());
        let more = Shape { cpus: 3, mem: 1024 };
        assert_ne!(plan.fingerprint(), Plan { shape: &more, ..plan }.fingerprint());
    }

    #[test]
    fn the_first_processor_of_an_emulated_host_is_spare() {
        let shape = Shape { cpus: 2, mem: 512 };
        let line = |accel: &Accel| {
            let image = Path::new("/i");
            let plan = Plan { accel, shape: &shape, image, shares: &[], switch: None };
            plan.args(Path::new("/run"), &Origin::Boot(Path::new("/ram"))).join(" ")
        };
        assert!(line(&accel()).contains("-smp 3 ") && line(&accel()).contains("isolcpus=0"));
        let kvm = Accel { emulated: false, ..accel() };
        assert!(line(&kvm).contains("-smp 2 ") && !line(&kvm).contains("isolcpus"));
    }

    #[test]
    fn commas_in_folders_do_not_become_options() {
        let (accel, shape) = (accel(), Shape { cpus: 1, mem: 512 });
        let share = [Share { folder: "/a,path=/etc".into(), target: "/y".into() }];
        let plan =
            Plan { accel: &accel, shape: &shape, image: Path::new("/i"), shares: &share, switch: None };
        let args = plan.args(Path::new("/run"), &Origin::Boot(Path::new("/ram")));
        assert!(args.iter().any(|arg| arg.contains("path=/a,,path=/etc,security_model")));
    }
}
