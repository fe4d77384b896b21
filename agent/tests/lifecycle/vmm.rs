//! The VMM's side: control socket, guest streams, exit record; no guest. What it does depends on the guest's host name:
//! `stubborn` does not stop when asked, `short` ends at once, `silent` ends without a record.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::process::exit;
use std::thread;

use blixard_vmm_api::control::{BootTimes, FromVmm, Phase, Reply, Request, Status};
use blixard_vmm_api::exit::ExitRecord;
use blixard_vmm_api::{ExitReason, VmConfig};
use nix::sys::socket::{MsgFlags, SockFlag, accept4, recv, send};

fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the configuration names each descriptor once, and it is taken here once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

fn end(config: &VmConfig, reason: ExitReason) -> ! {
    let record = ExitRecord {
        vm: config.vm,
        reason: reason.clone(),
        workload: None,
        guest_problem: None,
        events: vec![],
    };
    let number = config.descriptors[config.exit_record.as_ref().unwrap()];
    let mut file = File::from(own(number));
    file.write_all(&serde_json::to_vec(&record).unwrap()).unwrap();
    exit(i32::from(reason.code()))
}

/// What the jail looks like from inside, one `name=value` per line.
fn look_around() -> String {
    let mut seen = BTreeMap::new();
    let files = std::fs::read_dir("/").map(|entries| entries.count().to_string());
    seen.insert("files in /", files.unwrap_or_else(|e| e.to_string()));
    let made = File::create("/file").map_or_else(|e| e.kind().to_string(), |_| "made".into());
    seen.insert("a new file", made);
    seen.insert("pid", std::process::id().to_string());
    seen.insert("uid", nix::unistd::getuid().to_string());
    seen.insert("gid", nix::unistd::getgid().to_string());
    seen.insert("groups", nix::unistd::getgroups().unwrap().len().to_string());
    let caps = caps::read(None, caps::CapSet::Permitted).unwrap();
    seen.insert("capabilities", caps.len().to_string());
    let bounding =
        caps::all().into_iter().filter(|c| caps::has_cap(None, caps::CapSet::Bounding, *c).unwrap());
    seen.insert("bounding set", bounding.count().to_string());
    seen.insert("no new privileges", nix::sys::prctl::get_no_new_privs().unwrap().to_string());
    seen.insert("dumpable", nix::sys::prctl::get_dumpable().unwrap().to_string());
    let own = nix::unistd::Pid::this() == nix::unistd::getsid(None).unwrap();
    seen.insert("own session", own.to_string());
    let interfaces = nix::net::if_::if_nameindex().unwrap();
    let names: Vec<_> = interfaces.iter().map(|i| i.name().to_str().unwrap().to_owned()).collect();
    seen.insert("interfaces", names.join(","));
    seen.insert("host name", nix::unistd::gethostname().unwrap().into_string().unwrap());
    let open = (0..1024).filter(|n| nix::fcntl::fcntl(own_ref(*n), nix::fcntl::FcntlArg::F_GETFD).is_ok());
    let open: Vec<String> = open.map(|n| n.to_string()).collect();
    seen.insert("descriptors", open.join(","));
    seen.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
}

fn own_ref(number: RawFd) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: only asked whether it is open.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(number) }
}

pub fn run(number: RawFd) -> ! {
    let seen = look_around();
    let mut text = String::new();
    File::from(own(number)).read_to_string(&mut text).unwrap();
    let config: VmConfig = serde_json::from_str(&text).unwrap();
    config.validate().unwrap();
    let name = config.guest.as_ref().unwrap().hostname.clone();
    let fd = |name: &str| config.descriptors[name];
    let mut log = File::from(own(fd(config.console.log.as_ref().unwrap())));
    writeln!(log, "{name} runs").unwrap();
    match name.as_str() {
        "short" => end(&config, ExitReason::PowerOff),
        "silent" => {
            eprintln!("I have my reasons");
            exit(9)
        }
        _ => {}
    }
    let streams = UnixListener::from(own(fd(&config.vsock.as_ref().unwrap().listener)));
    thread::spawn(move || {
        for stream in streams.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 13];
            stream.read_exact(&mut request).unwrap();
            assert_eq!(&request, b"CONNECT 1025\n");
            stream.write_all(format!("OK 1025\n{seen}").as_bytes()).unwrap();
        }
    });
    let control = own(fd(config.control.as_ref().unwrap()));
    loop {
        let connection = own(accept4(control.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap());
        let config = config.clone();
        thread::spawn(move || converse(&connection, &config));
    }
}

fn converse(connection: &OwnedFd, config: &VmConfig) {
    let stubborn = config.guest.as_ref().unwrap().hostname == "stubborn";
    let mut buffer = vec![0; 65_536];
    loop {
        let length = recv(connection.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        if length == 0 {
            return;
        }
        let reply = match serde_json::from_slice(&buffer[..length]).unwrap() {
            Request::Stop if stubborn => Reply::Done,
            Request::Stop => end(config, ExitReason::PowerOff),
            Request::Kill => end(config, ExitReason::Killed),
            _ => Reply::Status(Status {
                vm: config.vm,
                phase: Phase::Running,
                guest_ready: true,
                workload: None,
                guest_problem: None,
                health: None,
                times: BootTimes { process_start_us: Some(1), ..BootTimes::default() },
                landlock: None,
            }),
        };
        let bytes = serde_json::to_vec(&FromVmm::Reply(reply)).unwrap();
        send(connection.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL).unwrap();
    }
}
