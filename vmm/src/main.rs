//! `blixard-vmm`: one process, one VM. Takes inherited descriptors, builds, boots, enters the sandbox, exits with a reason.
#![no_main]

mod client;
mod front_end;
mod terminal;

use std::ffi::{CStr, c_char, c_int};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, RawFd};
use std::sync::Arc;

use blixard_vmm::descriptors::Descriptors;
use blixard_vmm::machine::{Assembled, StartError};
use blixard_vmm::sandbox;
use blixard_vmm::times::{Moment, Times};
use blixard_vmm_api::config::CONFIG_BYTES_MAX;
use blixard_vmm_api::exit::ExitRecord;
use blixard_vmm_api::stats::FlightEvent;
use blixard_vmm_api::{ExitReason, VmConfig, VmId};

/// What the command line asks for.
enum Command {
    /// Run the VM whose configuration is in this descriptor.
    Config(RawFd),
    /// Run the VM that was described by paths.
    Run(Box<front_end::Options>),
    /// Tell what guests this machine can run.
    Probe {
        /// As JSON.
        json: bool,
    },
    /// Tell how this program is used.
    Help,
}

const USAGE: &str = "\
blixard-vmm --config-fd N        run the VM whose configuration (JSON) is in descriptor N
blixard-vmm run --kernel PATH    run a VM on this terminal; all paths are opened before the sandbox
    [--initramfs PATH] [--cmdline TEXT] [--vcpus N] [--memory MIB]
    [--disk PATH[,ro]]... [--pmem PATH[,ro]]... [--tap NAME[,QUEUES][,vhost]]... [--vsock PATH,CID] [--rng]
    [--balloon MIB[,oom][,reporting][,hinting][,statistics=SECONDS]]
    [--guest CONFIG] [--control PATH] [--boot-timer] [--no-stdin] [--log-syscalls]
    [--cpu BASELINE] [--track-writes] [--huge-pages] [--thp] [--merge] [--fork-ready]
blixard-vmm run --restore STATE,MEMORY [--base STATE,MEMORY]...
    run a VM from a snapshot, with devices as above; a diff needs the snapshots that it is based on, oldest first
    [--userfault] [--working-set PATH] [--clock-went-on] [--paused]
blixard-vmm snapshot CONTROL STATE MEMORY [--diff]
    write a snapshot of the VM whose control socket is CONTROL
blixard-vmm fork CONTROL COUNT [OPTIONS]
    start COUNT children of that VM, with devices as for run; sockets get .0, .1 and so on behind their name
blixard-vmm working-set CONTROL FILE
    write which pages the guest used since it was restored with --userfault
blixard-vmm cpu-baseline [FILE]...
    print what this host offers its guests of the processor, or what all hosts have whose answers are in the files
blixard-vmm pause|resume|status|stats|kill CONTROL
blixard-vmm probe [--json]       tell which guests /dev/kvm of this machine can run
";

/// The program. `std`'s own start is left out: it asks nine times for what is not used here (a signal stack per thread, guards,
/// whether the standard streams are open), and so is the giving back of memory and descriptors, which the kernel does at once.
#[unsafe(no_mangle)]
extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    let times = Arc::new(Times::default());
    times.note(Moment::ProcessStart);
    // SAFETY: no pointers are involved: that nobody reads standard output any more shall be an error, not the end.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let arguments: Vec<String> = (1..usize::try_from(argc).unwrap_or(0))
        .map(|index| {
            // SAFETY: the C runtime hands over `argc` pointers, so this place is among them.
            let place = unsafe { argv.add(index) };
            // SAFETY: the place is a pointer that the C runtime has written.
            let pointer = unsafe { *place };
            // SAFETY: each is to a string that ends with NUL and lives as long as the process.
            unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
        })
        .collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let Some(done) = client::run(&words, &mut io::stdout()) {
        if let Err(problem) = &done {
            say(&mut io::stderr(), &format!("blixard-vmm: {problem}\n"));
        }
        return done.is_err().into();
    }
    let code = match parse(&words) {
        Ok(Command::Config(fd)) => {
            name_process();
            finish(None, run_config(fd, times))
        }
        Ok(Command::Run(options)) => run_options(&options, times),
        Ok(Command::Probe { json }) => probe(json),
        Ok(Command::Help) => {
            say(&mut io::stdout(), USAGE);
            0
        }
        Err(problem) => {
            say(&mut io::stderr(), &format!("blixard-vmm: {problem}\n{USAGE}"));
            2
        }
    };
    // SAFETY: it ends the process. Nothing is left to be written: output goes through no buffer that is not flushed by line.
    unsafe { libc::_exit(code.into()) }
}

/// Gives the process its name: one that is executed by descriptor is called after the descriptor's number.
fn name_process() {
    // SAFETY: PR_SET_NAME reads a NUL-terminated string, which a C string literal is, and changes nothing but the name.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"blixard-vmm".as_ptr()) };
}

fn parse(words: &[&str]) -> Result<Command, String> {
    match words {
        ["--config-fd", number] => match number.parse::<RawFd>() {
            Ok(fd) if fd > 2 => Ok(Command::Config(fd)),
            _ => Err(format!("--config-fd: {number} is no inherited descriptor")),
        },
        ["run", rest @ ..] => Ok(Command::Run(Box::new(front_end::Options::parse(rest)?))),
        ["probe"] => Ok(Command::Probe { json: false }),
        ["probe", "--json"] => Ok(Command::Probe { json: true }),
        ["--help" | "-h" | "help"] | [] => Ok(Command::Help),
        [first, ..] => Err(format!("{first}: no such command or option")),
    }
}

/// Writes text for people; that nobody reads it is no reason to fail.
fn say(to: &mut dyn Write, text: &str) {
    let _ = to.write_all(text.as_bytes());
}

/// What is left of a VM: why it ended, and what is written to its exit record.
struct End {
    record: Option<(File, VmConfig)>,
    reason: ExitReason,
    workload: Option<blixard_vmm_api::guest::WorkloadExit>,
    guest_problem: Option<String>,
    events: Vec<FlightEvent>,
}

impl End {
    fn refused(reason: ExitReason) -> Self {
        Self { record: None, reason, workload: None, guest_problem: None, events: vec![] }
    }
}

fn run_config(fd: RawFd, times: Arc<Times>) -> End {
    if let Err(error) = sandbox::enter(false) {
        return End::refused(StartError::from(error).exit_reason());
    }
    match read_config(fd) {
        // SAFETY: the numbers come from whoever made this process and handed the descriptors over; they are distinct
        // and above the standard streams (validated), and nothing else here owns them.
        Ok(config) => match unsafe { Descriptors::inherit(&config.descriptors) } {
            Ok(given) => run(config, given, times, false),
            Err(error) => End::refused(StartError::from(error).exit_reason()),
        },
        Err(detail) => End::refused(ExitReason::BadConfig { detail }),
    }
}

fn read_config(fd: RawFd) -> Result<VmConfig, String> {
    // SAFETY: no pointers are involved.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(format!("configuration: descriptor {fd}: {}", io::Error::last_os_error()));
    }
    // SAFETY: it is open, and the command line gave it to us.
    let file = unsafe { File::from_raw_fd(fd) };
    let limit = u64::try_from(CONFIG_BYTES_MAX).unwrap_or(u64::MAX);
    let mut text = vec![];
    file.take(limit + 1).read_to_end(&mut text).map_err(|error| format!("configuration: {error}"))?;
    if text.len() > CONFIG_BYTES_MAX {
        return Err(format!("configuration: longer than {CONFIG_BYTES_MAX} bytes"));
    }
    let config: VmConfig =
        serde_json::from_slice(&text).map_err(|error| format!("configuration: {error}"))?;
    config.validate().map_err(|error| error.to_string())?;
    if config.descriptors.values().any(|number| *number == fd) {
        return Err(format!("descriptors: {fd} is the configuration itself"));
    }
    Ok(config)
}

fn run(config: VmConfig, mut given: Descriptors, times: Arc<Times>, log_only: bool) -> End {
    let record = config.exit_record.as_ref().and_then(|name| given.take(name).ok()).map(File::from);
    if let Some(file) = &record {
        sandbox::forbidden::record_in(file.as_fd(), config.vm);
        record_panics(file.as_raw_fd(), config.vm);
    }
    let started =
        Assembled::new(&config, given, times).and_then(|a| a.load(log_only)).and_then(|l| l.start(log_only));
    let (reason, (workload, guest_problem), events) = match started {
        Ok(mut running) => {
            give_back_stack();
            let reason = running.run();
            let events = if reason.is_abnormal() { running.flight_events() } else { vec![] };
            let outcome = running.guest().outcome();
            // The process ends now, and the kernel takes all at once what would be given back piece by piece.
            std::mem::forget(running);
            (reason, outcome, events)
        }
        Err(error) => (error.exit_reason(), (None, None), vec![]),
    };
    End { record: record.map(|file| (file, config)), reason, workload, guest_problem, events }
}

/// Gives back the pages of this thread's stack that only reading the configuration and building the VM needed: some 8 KiB that
/// each VM would keep for its whole life.
#[inline(never)]
fn give_back_stack() {
    const PAGE: usize = 4096;
    /// What calls from here have used is no more than this; the kernel maps more for each stack when a program begins
    /// (`setup_arg_pages` in fs/exec.c: 128 KiB).
    const BELOW: usize = 16 * PAGE;
    let here = 0u8;
    let address = (&raw const here).addr();
    // What this function and the system call use stays: the page of `here` and the one below it.
    let end = (address & !(PAGE - 1)).saturating_sub(PAGE);
    let start = end.saturating_sub(BELOW);
    // SAFETY: it is memory of this stack below all frames that are in use, and reads as zeros afterwards, which nothing relies
    // on not to be so. When part of it is not mapped nothing happens there, which is told and does not matter.
    let _ = unsafe {
        libc::madvise(std::ptr::with_exposed_provenance_mut(start), end - start, libc::MADV_DONTNEED)
    };
}

/// Lets a panic, which no input should be able to cause, leave an exit record with the last events and end the process.
fn record_panics(record: RawFd, vm: VmId) {
    let say_it = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let reason = ExitReason::Internal { detail: format!("panic: {panic}") };
        let events = blixard_vmm::flight::events_now();
        let record_of_end = ExitRecord { vm, reason, workload: None, guest_problem: None, events };
        if let Ok(text) = serde_json::to_vec(&record_of_end) {
            // SAFETY: pointer and length are those of a slice; the descriptor is open until the process ends.
            let _too_late_to_care = unsafe { libc::write(record, text.as_ptr().cast(), text.len()) };
        }
        say_it(panic);
        std::process::abort();
    }));
}

fn run_options(options: &front_end::Options, times: Arc<Times>) -> u8 {
    match options.open() {
        Ok((config, given)) => {
            if let Err(error) = sandbox::enter(options.log_syscalls()) {
                return finish(None, End::refused(StartError::from(error).exit_reason()));
            }
            let terminal = terminal::Raw::enter(options.reads_stdin());
            finish(terminal, run(config, given, times, options.log_syscalls()))
        }
        Err(reason) => finish(None, End::refused(reason)),
    }
}

/// Writes the exit record, tells people why, and answers the exit code.
fn finish(terminal: Option<terminal::Raw>, end: End) -> u8 {
    let End { record, reason, workload, guest_problem, events } = end;
    drop(terminal);
    if let Some((mut file, config)) = record {
        let record = ExitRecord { vm: config.vm, reason: reason.clone(), workload, guest_problem, events };
        let written =
            serde_json::to_vec(&record).map_err(io::Error::other).and_then(|text| file.write_all(&text));
        if let Err(error) = written {
            say(&mut io::stderr(), &format!("blixard-vmm: exit record: {error}\n"));
        }
    }
    if reason.is_abnormal() {
        say(&mut io::stderr(), &format!("blixard-vmm: {reason}\n"));
    }
    reason.code()
}

fn probe(json: bool) -> u8 {
    let answer = blixard_vmm::probe::probe();
    let text = if json { serde_json::to_string(&answer).unwrap_or_default() } else { answer.to_string() };
    say(&mut io::stdout(), &format!("{text}\n"));
    0
}
