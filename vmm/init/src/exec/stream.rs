//! Runs the command of one exec stream: a loop that waits for the connection, the command's standard streams and its
//! end, and moves bytes between them with bounded buffers.
//!
//! Backpressure goes all the way: output is not read while the host does not take it, and frames are not read while
//! the command does not read its standard input. A signal behind unread input therefore waits with it; closing the
//! connection does not.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blixard_vmm_api::guest::WorkloadExit;
use blixard_vmm_api::guest::frame::{ExecRequest, Frame};
use libc::{POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP};
use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid};

use super::wire::{CHUNK, Wire, WireError};
use crate::children::{Children, OnExit};
use crate::command::{self, NotStarted, Surroundings};
use crate::link::{is_transient, set_nonblocking};
use crate::sys;

/// How long the host may take to say what to run.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long a command may take to end after its connection broke and it was told so by SIGHUP.
const HANG_UP_LIMIT: Duration = Duration::from_secs(5);
/// How long the host may take nothing of the output of a command that has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// How long the host may take to close a connection after the last frame.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// How long a terminal may be kept open by others after its session leader has ended and the kernel hung it up.
const TERMINAL_LIMIT: Duration = Duration::from_secs(1);
/// Frames are read only while less than this waits for the command to read it.
const STDIN_LOW: usize = 256 << 10;
/// End of file, typed on a terminal (`VEOF`, Ctrl-D).
const TYPED_END: u8 = 4;
/// The bit of standard output and standard error in [`Running::outputs`].
const STDERR: usize = 1;

/// Serves one connection from its first frame to its end.
pub fn run(children: &Children, mut wire: Wire) {
    // What is wrong with a connection cannot be told over it, and there is nobody else to tell.
    if serve(children, &mut wire).is_ok() {
        wire.finish(CLOSE_LIMIT);
    }
}

fn serve(children: &Children, wire: &mut Wire) -> Result<(), WireError> {
    let last = match first_frame(wire)? {
        Ok(request) => match start(children, &request) {
            Ok(mut running) => match running.pump(children, wire) {
                Ok(exit) => Frame::Exit(exit),
                Err(error) => {
                    running.hang_up(children);
                    return Err(error);
                }
            },
            Err(refusal) => {
                wire.send(&Frame::Stderr(format!("{refusal}\n").into_bytes()));
                Frame::Exit(refusal.exit())
            }
        },
        Err(reason) => Frame::Refused(reason),
    };
    wire.send(&last);
    while wire.has_output() {
        sys::poll(&[(wire.descriptor(), POLLOUT)], Some(DRAIN_LIMIT));
        if wire.flush()? == 0 {
            return Err(io::Error::from(io::ErrorKind::TimedOut).into());
        }
    }
    Ok(())
}

/// What to run, or why not.
fn first_frame(wire: &mut Wire) -> Result<Result<ExecRequest, String>, WireError> {
    let end = Instant::now() + START_LIMIT;
    loop {
        match wire.next() {
            Ok(Some(Frame::Start(request))) => {
                let checked = request.command.validate("command");
                return Ok(checked.map(|()| request).map_err(|error| error.to_string()));
            }
            Ok(Some(_)) => return Ok(Err("the first frame must be the request".into())),
            Err(_) => return Ok(Err("the request is not well-formed".into())),
            Ok(None) => {}
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Err("no request came in time".into()));
        }
        sys::poll(&[(wire.descriptor(), POLLIN)], Some(left));
        wire.fill()?;
    }
}

/// A command that was started.
struct Running {
    pid: i32,
    /// The terminal's side of init, if it has one.
    terminal: Option<File>,
    stdin: Option<File>,
    /// Bytes for standard input.
    pending: Vec<u8>,
    /// Close standard input when `pending` is written.
    stdin_ends: bool,
    /// Where standard output and standard error are read, while they are open.
    outputs: [Option<File>; 2],
    /// How many bytes of each are still to be read after the end of the command.
    left: [usize; 2],
    /// Becomes readable when the command has ended.
    ended: PipeReader,
    exit: mpsc::Receiver<WorkloadExit>,
}

fn start(children: &Children, request: &ExecRequest) -> Result<Running, NotStarted> {
    let surroundings = Surroundings { terminal: request.terminal.map(|_| "xterm"), make_directory: false };
    let (mut command, identity) = command::prepare(&request.command, surroundings)?;
    let program = request.command.args.first().map_or("", String::as_str);
    let internal = |error: io::Error| NotStarted { code: 126, reason: format!("{program}: {error}") };

    let mut terminal = None;
    if let Some((columns, rows)) = request.terminal {
        let (ours, theirs) = open_terminal(columns, rows, identity.uid).map_err(internal)?;
        let copy = || theirs.try_clone().map(Stdio::from).map_err(internal);
        command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
        terminal = Some(ours);
    } else {
        let stdin = if request.stdin { Stdio::piped() } else { Stdio::null() };
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    let (ended, ends) = io::pipe().map_err(internal)?;
    let (tell, exit) = mpsc::channel();
    let on_exit: OnExit = Box::new(move |how| {
        // The stream may be gone; it has killed the command then.
        let _gone = tell.send(how);
        drop(ends);
    });
    let started =
        children.spawn(&mut command, on_exit).map_err(|error| NotStarted::from_spawn(program, &error))?;
    // The command holds the terminal's other side; it must not stay open here.
    drop(command);

    let file = |descriptor: OwnedFd| set_nonblocking(&descriptor).map(|()| File::from(descriptor));
    let mut running = Running {
        pid: started.pid,
        terminal: None,
        stdin: None,
        pending: vec![],
        stdin_ends: false,
        outputs: [None, None],
        left: [0; 2],
        ended,
        exit,
    };
    let ends = || -> io::Result<()> {
        if let Some(terminal) = terminal {
            set_nonblocking(&terminal)?;
            running.stdin = Some(terminal.try_clone()?);
            running.outputs = [Some(terminal.try_clone()?), None];
            running.terminal = Some(terminal);
        } else {
            running.stdin = started.stdin.map(|pipe| file(pipe.into())).transpose()?;
            let stdout = started.stdout.map(|pipe| file(pipe.into())).transpose()?;
            running.outputs = [stdout, started.stderr.map(|pipe| file(pipe.into())).transpose()?];
        }
        Ok(())
    }();
    if let Err(error) = ends {
        running.hang_up(children);
        return Err(internal(error));
    }
    Ok(running)
}

/// A new terminal that belongs to the command's user: our side and the command's side.
fn open_terminal(columns: u16, rows: u16, uid: u32) -> io::Result<(File, File)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let ours = nix::pty::posix_openpt(flags)?;
    nix::pty::unlockpt(&ours)?;
    let theirs =
        nix::fcntl::open(nix::pty::ptsname_r(&ours)?.as_str(), flags, nix::sys::stat::Mode::empty())?;
    sys::set_terminal_size(theirs.as_fd(), columns, rows)?;
    if Uid::effective().is_root() {
        nix::unistd::fchown(&theirs, Some(Uid::from_raw(uid)), None::<Gid>)?;
    }
    Ok((File::from(OwnedFd::from(ours)), File::from(theirs)))
}

/// What became ready.
#[derive(Clone, Copy)]
enum Ready {
    Connection,
    Stdin,
    Output(usize),
    End,
}

impl Running {
    /// Moves bytes until the command has ended and all of its output is on its way.
    fn pump(&mut self, children: &Children, wire: &mut Wire) -> Result<WorkloadExit, WireError> {
        let mut exit = None;
        let mut progress = Instant::now();
        loop {
            self.take_input(children, wire)?;
            let mut left = None;
            if let Some(exit) = exit {
                self.drain_pipes(wire);
                if self.outputs.iter().all(Option::is_none) {
                    return Ok(exit);
                }
                let limit = if wire.has_output() { DRAIN_LIMIT } else { TERMINAL_LIMIT };
                let rest = limit.saturating_sub(progress.elapsed());
                match (rest.is_zero(), wire.has_output()) {
                    (true, true) => return Err(io::Error::from(io::ErrorKind::TimedOut).into()),
                    (true, false) => return Ok(exit),
                    _ => left = Some(rest),
                }
            }
            for (what, events) in self.wait(wire, exit.is_none(), left) {
                match what {
                    Ready::Connection => {
                        let gone = events & (POLLHUP | POLLERR | POLLRDHUP) != 0;
                        if (gone || events & POLLIN != 0) && wire.wants_input() {
                            wire.fill()?;
                        } else if gone {
                            return Err(io::Error::from(io::ErrorKind::BrokenPipe).into());
                        }
                    }
                    Ready::Stdin if events & (POLLERR | POLLHUP) != 0 => self.close_stdin(),
                    Ready::Stdin => {}
                    Ready::Output(which) => {
                        self.read_output(which, CHUNK, wire);
                        progress = Instant::now();
                    }
                    Ready::End => {
                        exit = Some(self.exit.recv().map_err(io::Error::other)?);
                        self.close_stdin();
                        self.measure_pipes();
                        progress = Instant::now();
                    }
                }
            }
            if wire.flush()? > 0 {
                progress = Instant::now();
            }
        }
    }

    fn wait(&self, wire: &Wire, alive: bool, left: Option<Duration>) -> Vec<(Ready, i16)> {
        let mut what = vec![];
        let mut watched: Vec<(BorrowedFd<'_>, i16)> = vec![];
        let mut watch = |name, descriptor, events| {
            what.push(name);
            watched.push((descriptor, events));
        };
        let input = if wire.wants_input() && self.pending.len() < STDIN_LOW { POLLIN } else { 0 };
        let output = if wire.has_output() { POLLOUT } else { 0 };
        watch(Ready::Connection, wire.descriptor(), POLLRDHUP | input | output);
        if let Some(stdin) = &self.stdin {
            let events = if self.pending.is_empty() { 0 } else { POLLOUT };
            // A pipe is watched with nothing to write as well: that it was closed is worth knowing. A terminal
            // reports the end of its other side with its output.
            if events != 0 || self.terminal.is_none() {
                watch(Ready::Stdin, stdin.as_fd(), events);
            }
        }
        for (which, output) in self.outputs.iter().enumerate() {
            if let Some(output) = output.as_ref().filter(|_| wire.wants_output()) {
                watch(Ready::Output(which), output.as_fd(), POLLIN);
            }
        }
        if alive {
            watch(Ready::End, self.ended.as_fd(), POLLIN);
        }
        let found = sys::poll(&watched, left);
        what.into_iter().zip(found).filter(|(_, events)| *events != 0).collect()
    }

    /// Takes frames and writes standard input until one of both has to wait. Writing makes room for frames that are here
    /// already: no event announces those.
    fn take_input(&mut self, children: &Children, wire: &mut Wire) -> Result<(), WireError> {
        loop {
            let mut took = false;
            while self.pending.len() < STDIN_LOW && self.take_frame(children, wire)? {
                took = true;
            }
            self.write_stdin();
            if !took || self.pending.len() >= STDIN_LOW {
                return Ok(());
            }
        }
    }

    /// Takes one frame, if there is one.
    fn take_frame(&mut self, children: &Children, wire: &mut Wire) -> Result<bool, WireError> {
        match wire.next()? {
            None => return Ok(false),
            Some(Frame::Stdin(bytes)) if self.stdin.is_some() && !self.stdin_ends => {
                self.stdin_ends = bytes.is_empty();
                self.pending.extend(bytes);
                if self.stdin_ends && self.terminal.is_some() {
                    self.pending.push(TYPED_END);
                }
            }
            // The command does not read: what is sent to it is lost, as in a pipe with no reader.
            Some(Frame::Stdin(_)) => {}
            Some(Frame::Resize(columns, rows)) => {
                if let Some(terminal) = &self.terminal {
                    // A terminal that is gone needs no size.
                    let _gone = sys::set_terminal_size(terminal.as_fd(), columns, rows);
                }
            }
            Some(Frame::Signal(signal)) => children.signal_group(self.pid, signal.into()),
            Some(_) => return Err(io::Error::from(io::ErrorKind::InvalidData).into()),
        }
        Ok(true)
    }

    fn write_stdin(&mut self) {
        while !self.pending.is_empty() {
            let Some(stdin) = &mut self.stdin else { break };
            match stdin.write(&self.pending) {
                Ok(0) => return,
                Ok(length) => drop(self.pending.drain(..length)),
                Err(error) if is_transient(&error) => return,
                Err(_closed) => self.close_stdin(),
            }
        }
        // A terminal stays open for output; its end of input was typed.
        if self.stdin_ends && self.terminal.is_none() {
            self.close_stdin();
        }
    }

    fn close_stdin(&mut self) {
        self.stdin = None;
        self.pending.clear();
    }

    /// Reads at most `most` bytes from an output. Its end and its errors (a terminal's end is EIO) close it; the
    /// answer is how many bytes were read.
    fn read_output(&mut self, which: usize, most: usize, wire: &mut Wire) -> usize {
        let Some(slot) = self.outputs.get_mut(which) else { return 0 };
        let Some(output) = slot else { return 0 };
        let mut bytes = vec![0; most.min(CHUNK)];
        match output.read(&mut bytes) {
            Ok(length @ 1..) => {
                bytes.truncate(length);
                wire.send(&if which == STDERR { Frame::Stderr(bytes) } else { Frame::Stdout(bytes) });
                return length;
            }
            Err(error) if is_transient(&error) => {}
            Ok(_) | Err(_) => *slot = None,
        }
        0
    }

    /// Notes how much is in the pipes when the command has just ended: that is what it wrote, and all that is still to
    /// come from it, even if a process in the background holds a pipe open.
    fn measure_pipes(&mut self) {
        for (left, output) in self.left.iter_mut().zip(&self.outputs) {
            *left = output.as_ref().map_or(0, |pipe| sys::readable_bytes(pipe.as_fd()).unwrap_or(0));
        }
    }

    /// After the end of the command: reads what [`Self::measure_pipes`] has found. A terminal tells its end itself.
    fn drain_pipes(&mut self, wire: &mut Wire) {
        if self.terminal.is_some() {
            return;
        }
        for which in 0..self.outputs.len() {
            while wire.wants_output() {
                let left = self.left.get(which).copied().unwrap_or(0);
                let length = self.read_output(which, left, wire);
                if let Some(left) = self.left.get_mut(which) {
                    *left -= length.min(*left);
                }
                if length == 0 {
                    if let Some(output) = self.outputs.get_mut(which) {
                        *output = None;
                    }
                    break;
                }
            }
        }
    }

    /// Ends a command whose connection broke.
    fn hang_up(&mut self, children: &Children) {
        self.close_stdin();
        self.outputs = [None, None];
        self.terminal = None;
        children.signal_group(self.pid, libc::SIGHUP);
        // A stopped process hears of it when it goes on.
        children.signal_group(self.pid, libc::SIGCONT);
        sys::poll(&[(self.ended.as_fd(), POLLIN)], Some(HANG_UP_LIMIT));
        if self.exit.try_recv().is_err() {
            children.signal_group(self.pid, libc::SIGKILL);
        }
    }
}
