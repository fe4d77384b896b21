//! The jail of a VMM: what it has is what it was handed.
//!
//! In order, each with its reason:
//! 1. `clone3` into the VM's cgroup (its limits hold from its first instruction) with new mount, process, network, IPC, host
//!    name and cgroup namespaces (it sees no file, process, interface, queue or name of the host), and a pidfd.
//! 2. Its descriptors get fixed numbers from 3, all others are closed; own session, no signal blocked: nothing that ends the
//!    agent ends it.
//! 3. An empty read-only tmpfs becomes its root; the host's mounts are detached.
//! 4. Limits of the process: descriptors, no core file (it would hold the guest's memory), locked memory.
//! 5. No supplementary group, empty bounding set, its own uid and gid, no new privileges: it has nothing and gains nothing.
//! 6. Standard input and output are `/dev/null`, standard error a bounded memory file; its descriptors follow from number 3;
//!    all others are closed.
//! 7. The program is executed by descriptor: a sealed copy in memory without read permission, so the kernel makes the process
//!    undumpable (no ptrace, its `/proc` files belong to root), which `PR_SET_DUMPABLE` before `execve` cannot.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

mod spawn;

/// `MFD_EXEC` of Linux 6.3 (include/uapi/linux/memfd.h): the file may be executed also where the host forbids it by default.
const MFD_EXEC: u32 = 0x10;
/// Room for what a VMM writes to standard error, in bytes.
const SAID_BYTES: usize = 16 << 10;

/// Why a jailed process was not started.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The program cannot be made ready.
    #[error("cannot read the program {path}")]
    Program {
        /// Its path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The agent itself cannot do something.
    #[error("cannot {operation}")]
    Prepare {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The new process could not lock itself in.
    #[error("the jail could not {deed}")]
    Deed {
        /// What was tried.
        deed: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn prepare<E: Into<io::Error>>(operation: &'static str) -> impl Fn(E) -> JailError {
    move |source| JailError::Prepare { operation, source: source.into() }
}

/// A program that can be started in a jail: a sealed copy in memory, so that replacing the file does not change what runs.
#[derive(Debug)]
pub struct Program {
    image: OwnedFd,
}

/// A memory file; `exec` when it will be executed.
fn memory_file(name: &str, exec: bool) -> Result<File, JailError> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let wanted = if exec { flags | MFdFlags::from_bits_retain(MFD_EXEC) } else { flags };
    let made = match memfd_create(name, wanted) {
        Err(Errno::EINVAL) => memfd_create(name, flags),
        other => other,
    };
    made.map(File::from).map_err(prepare("make a memory file"))
}

/// A sealed memory file with this content.
///
/// # Errors
/// See [`JailError::Prepare`].
pub fn sealed(name: &str, content: &[u8]) -> Result<OwnedFd, JailError> {
    let mut file = memory_file(name, false)?;
    io::Write::write_all(&mut file, content).map_err(prepare("write a memory file"))?;
    io::Seek::rewind(&mut file).map_err(prepare("write a memory file"))?;
    let all =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(all)).map_err(prepare("seal a memory file"))?;
    Ok(file.into())
}

impl Program {
    /// Copies the program at `path`. It is one static file: in the jail there is no library and no interpreter.
    ///
    /// # Errors
    /// See [`JailError`].
    pub fn load(path: &Path) -> Result<Self, JailError> {
        let wrong = |source| JailError::Program { path: path.into(), source };
        let mut file = File::open(path).map_err(wrong)?;
        if !file.metadata().map_err(wrong)?.is_file() {
            return Err(wrong(io::ErrorKind::InvalidInput.into()));
        }
        let mut image = memory_file("blixard-vmm", true)?;
        io::copy(&mut file, &mut image).map_err(wrong)?;
        image
            .set_permissions(std::fs::Permissions::from_mode(0o111))
            .map_err(prepare("protect the program"))?;
        let all =
            SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
        fcntl(&image, FcntlArg::F_ADD_SEALS(all)).map_err(prepare("seal the program"))?;
        Ok(Self { image: image.into() })
    }
}

/// What a jailed process said on standard error: at most 16 KiB, because the file cannot grow.
#[derive(Debug)]
pub struct Said(File);

impl Said {
    fn new() -> Result<Self, JailError> {
        let file = memory_file("said", false)?;
        file.set_len(u64::try_from(SAID_BYTES).unwrap_or(0)).map_err(prepare("make a memory file"))?;
        let size = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(size)).map_err(prepare("seal a memory file"))?;
        Ok(Self(file))
    }

    /// The last line, at most 300 characters; `None` when it said nothing.
    pub fn last_line(&self) -> Option<String> {
        let mut bytes = vec![0; SAID_BYTES];
        let read = std::os::unix::fs::FileExt::read_at(&self.0, &mut bytes, 0).ok()?;
        bytes.truncate(read);
        let text = String::from_utf8_lossy(&bytes);
        let line = text.trim_end_matches(['\0', '\n', ' ']).lines().last()?.trim();
        let printable = line.chars().filter(|c| !c.is_control()).take(300).collect::<String>();
        (!printable.is_empty()).then_some(printable)
    }
}

/// How to start a process in a jail.
#[derive(Debug)]
pub struct Order<'a> {
    /// The program.
    pub program: &'a Program,
    /// Its arguments, the first is its name.
    pub arguments: Vec<CString>,
    /// Its cgroup, if any.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// A folder on which the empty root is mounted, in the mount namespace of the process only.
    pub root: &'a Path,
    /// Its uid and gid.
    pub identity: u32,
    /// Descriptors that it gets, numbered from [`FIRST_DESCRIPTOR`].
    pub descriptors: Vec<BorrowedFd<'a>>,
}

/// Number of the first descriptor that is handed over.
pub const FIRST_DESCRIPTOR: i32 = 3;

/// A process in its jail.
#[derive(Debug)]
pub struct Jailed {
    /// Process id.
    pub pid: i32,
    /// Descriptor of the process.
    pub process: OwnedFd,
    /// What it says.
    pub said: Said,
}

/// Starts a process in a jail and waits until it has executed the program.
///
/// # Errors
/// See [`JailError`]; no process is left then.
pub fn start(order: &Order) -> Result<Jailed, JailError> {
    let said = Said::new()?;
    let null = File::options().read(true).write(true).open("/dev/null").map_err(prepare("open /dev/null"))?;
    let (reader, writer) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(prepare("make a pipe"))?;
    let root = CString::new(order.root.as_os_str().as_bytes()).map_err(|_| {
        let source = io::ErrorKind::InvalidInput.into();
        JailError::Prepare { operation: "name the root", source }
    })?;
    let streams = [null.as_fd(), null.as_fd(), said.0.as_fd()];
    let all = streams.iter().chain(&order.descriptors).map(AsRawFd::as_raw_fd);
    let child = spawn::Child::new(
        all.collect(),
        order.program.image.as_raw_fd(),
        writer.as_raw_fd(),
        &root,
        order.identity,
        &order.arguments,
    );
    let cgroup = order.cgroup.map(|fd| fd.as_raw_fd());
    let (pid, process) = spawn::clone_into(cgroup, &child).map_err(prepare("start a process"))?;
    drop(writer);
    // The pipe closes without a word when the program is executed.
    let mut answer = Vec::new();
    let read = File::from(reader).take(16).read_to_end(&mut answer);
    let failure = match (read, answer.as_slice()) {
        (Ok(_), []) => return Ok(Jailed { pid, process, said }),
        (Ok(_), [deed, a, b, c, d]) => JailError::Deed {
            deed: spawn::deed_name(*deed),
            source: io::Error::from_raw_os_error(i32::from_le_bytes([*a, *b, *c, *d])),
        },
        (Ok(_), _) => JailError::Deed { deed: "tell what failed", source: io::ErrorKind::InvalidData.into() },
        (Err(source), _) => JailError::Prepare { operation: "read from the jail", source },
    };
    // It ends by itself; after an error of ours it may not.
    let _ = crate::process::kill(&process);
    let _ = nix::sys::wait::waitid(
        nix::sys::wait::Id::PIDFd(process.as_fd()),
        nix::sys::wait::WaitPidFlag::WEXITED,
    );
    Err(failure)
}
