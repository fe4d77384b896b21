//! Exec streams over a socket pair, with real programs of the machine that runs the tests.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use blixard_vmm_api::guest::frame::{ExecRequest, Frame, HEADER, PAYLOAD_MAX, decode_header};
use blixard_vmm_api::guest::{Command, WorkloadExit};
use proptest::prelude::*;

use super::*;
use crate::children::tests::children;

const LIMIT: Duration = Duration::from_secs(30);

struct Host(UnixStream);

#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    last: Frame,
}

impl Outcome {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Host {
    fn of(executor: &Arc<Executor>) -> Self {
        let (host, guest) = UnixStream::pair().unwrap();
        host.set_read_timeout(Some(LIMIT)).unwrap();
        executor.serve(guest.into());
        Self(host)
    }

    fn send(&mut self, frame: &Frame) {
        let bytes = frame.encode(|r| serde_json::to_vec(r).ok()).unwrap();
        // A guest that has ended the stream does not read on.
        let _ended = self.0.write_all(&bytes);
    }

    fn next(&mut self) -> Frame {
        let mut header = [0; HEADER];
        self.0.read_exact(&mut header).unwrap();
        let (kind, length) = decode_header(header).unwrap();
        let mut payload = vec![0; length];
        self.0.read_exact(&mut payload).unwrap();
        Frame::decode(kind, payload, |t| serde_json::from_slice(t).ok()).unwrap()
    }

    fn finish(&mut self) -> Outcome {
        let (mut stdout, mut stderr) = (vec![], vec![]);
        loop {
            match self.next() {
                Frame::Stdout(bytes) => stdout.extend(bytes),
                Frame::Stderr(bytes) => stderr.extend(bytes),
                last => {
                    let mut rest = vec![];
                    self.0.read_to_end(&mut rest).unwrap();
                    assert!(rest.is_empty(), "nothing follows the last frame");
                    return Outcome { stdout, stderr, last };
                }
            }
        }
    }

    fn wait_for(&mut self, text: &str) {
        let mut seen = vec![];
        while !String::from_utf8_lossy(&seen).contains(text) {
            match self.next() {
                Frame::Stdout(bytes) => seen.extend(bytes),
                other => panic!("{other:?} instead of {text:?} after {:?}", String::from_utf8_lossy(&seen)),
            }
        }
    }
}

fn request(args: &[&str], terminal: Option<(u16, u16)>, stdin: bool) -> Frame {
    let args = args.iter().map(|a| (*a).to_owned()).collect();
    Frame::Start(ExecRequest { command: Command { args, ..Command::default() }, terminal, stdin })
}

fn begin(args: &[&str], terminal: Option<(u16, u16)>, stdin: bool) -> Host {
    let mut host = Host::of(&Executor::new(children()));
    host.send(&request(args, terminal, stdin));
    host
}

fn sh(script: &str) -> Outcome {
    begin(&["sh", "-c", script], None, false).finish()
}

fn exited(code: u8) -> Frame {
    Frame::Exit(WorkloadExit::Code(code))
}

#[test]
fn both_outputs_and_the_exit_code_arrive() {
    let outcome = sh("echo out; echo err >&2; exit 3");
    assert_eq!((outcome.text().as_str(), outcome.stderr.as_slice()), ("out\n", b"err\n".as_slice()));
    assert_eq!(outcome.last, exited(3));
}

#[test]
fn standard_input_that_was_not_asked_for_is_empty() {
    let outcome = sh("cat; echo end");
    assert_eq!((outcome.text().as_str(), outcome.last), ("end\n", exited(0)));
}

#[test]
fn a_mebibyte_of_standard_input_arrives_whole() {
    let mut host = begin(&["sha256sum"], None, true);
    for _ in 0..16 {
        host.send(&Frame::Stdin(vec![b'x'; 64 << 10]));
    }
    host.send(&Frame::Stdin(vec![]));
    let outcome = host.finish();
    // The digest of 2^20 times "x".
    let expected = "8f990ba0b577b51cf009ea049368c16bbda1b21e1b93be07a824758bb253c39b";
    assert_eq!(outcome.text().split(' ').next(), Some(expected));
    assert_eq!(outcome.last, exited(0));
}

#[test]
fn what_goes_in_comes_out_of_cat_while_both_directions_are_full() {
    let mut host = begin(&["cat"], None, true);
    let all: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let mut writer = Host(host.0.try_clone().unwrap());
    let sent = all.clone();
    let thread = std::thread::spawn(move || {
        for chunk in sent.chunks(PAYLOAD_MAX) {
            writer.send(&Frame::Stdin(chunk.to_vec()));
        }
        writer.send(&Frame::Stdin(vec![]));
    });
    let outcome = host.finish();
    thread.join().unwrap();
    assert_eq!(outcome.last, exited(0));
    assert!(outcome.stdout == all);
}

#[test]
fn a_command_that_does_not_read_its_input_ends_as_if_it_had() {
    let mut host = begin(&["sh", "-c", "exec 0<&-; echo closed; exit 5"], None, true);
    for _ in 0..8 {
        host.send(&Frame::Stdin(vec![0; 64 << 10]));
    }
    let outcome = host.finish();
    assert_eq!((outcome.text().as_str(), outcome.last), ("closed\n", exited(5)));
}

#[test]
fn input_that_is_still_on_its_way_when_the_command_ends_does_not_reset_the_connection() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // It ends when the test opens and closes the other side, and keeps its standard input open until then.
    let mut host = begin(&["cat", fifo.to_str().unwrap()], None, true);
    host.0.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let chunk = Frame::Stdin(vec![0; PAYLOAD_MAX]).encode(|_| None).unwrap();
    // More than all buffers on the way hold: until nothing more is taken.
    let mut rest = &chunk[..0];
    loop {
        if rest.is_empty() {
            rest = &chunk;
        }
        match host.0.write(rest) {
            Ok(count) => rest = &rest[count..],
            Err(error) => break assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
    drop(std::fs::File::options().write(true).open(&fifo).unwrap());
    // Only when the guest has ended its side: what is read before that says nothing about how it was ended.
    crate::sys::poll(&[(host.0.as_fd(), libc::POLLRDHUP)], Some(LIMIT));
    // `finish` reads to the end of the connection and fails on a reset.
    assert_eq!(host.finish().last, exited(0));
}

#[test]
fn much_output_of_a_command_that_has_ended_already_arrives_whole() {
    let mut host = begin(&["sh", "-c", "head -c 5000000 /dev/zero"], None, false);
    let outcome = host.finish();
    assert_eq!((outcome.stdout.len(), outcome.last), (5_000_000, exited(0)));
}

#[test]
fn a_process_left_in_the_background_does_not_keep_the_stream_open() {
    let begun = Instant::now();
    let outcome = sh("sleep 60 & echo $!");
    assert_eq!(outcome.last, exited(0));
    assert!(begun.elapsed() < LIMIT);
    crate::sys::kill(outcome.text().trim().parse().unwrap(), libc::SIGKILL).unwrap();
}

#[test]
fn a_signal_reaches_the_whole_group() {
    let mut host = begin(&["sh", "-c", "echo ready; sleep 60; echo not reached"], None, false);
    host.wait_for("ready");
    host.send(&Frame::Signal(15));
    assert_eq!(host.finish().last, Frame::Exit(WorkloadExit::Signal(15)));
}

#[test]
fn a_signal_that_does_not_exist_changes_nothing() {
    let mut host = begin(&["cat"], None, true);
    host.send(&Frame::Signal(250));
    host.send(&Frame::Stdin(b"still here".to_vec()));
    host.send(&Frame::Stdin(vec![]));
    let outcome = host.finish();
    assert_eq!((outcome.text().as_str(), outcome.last), ("still here", exited(0)));
}

#[test]
fn a_terminal_has_the_size_asked_for_and_then_the_new_one() {
    let script = "stty size; read line; stty size; tty; exit 4";
    let mut host = begin(&["sh", "-c", script], Some((100, 31)), true);
    host.wait_for("31 100");
    host.send(&Frame::Resize(77, 22));
    host.send(&Frame::Stdin(b"go\n".to_vec()));
    let outcome = host.finish();
    assert!(outcome.text().contains("22 77"), "{}", outcome.text());
    assert!(outcome.text().contains("/dev/pts/"), "{}", outcome.text());
    assert_eq!(outcome.last, exited(4));
}

#[test]
fn control_c_typed_on_a_terminal_interrupts() {
    let mut host = begin(&["sh", "-c", "echo ready; exec sleep 60"], Some((80, 24)), true);
    host.wait_for("ready");
    host.send(&Frame::Stdin(vec![3]));
    assert_eq!(host.finish().last, Frame::Exit(WorkloadExit::Signal(2)));
}

#[test]
fn a_command_takes_signals_that_its_executor_ignores() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: nothing else in this process uses the signal.
    unsafe { signal(Signal::SIGUSR2, SigHandler::SigIgn) }.unwrap();
    let mut host = begin(&["sh", "-c", "kill -s USR2 $$; echo ignored"], None, false);
    assert_eq!(host.finish().last, Frame::Exit(WorkloadExit::Signal(12)));
}

#[test]
fn the_end_of_input_on_a_terminal_is_typed() {
    let mut host = begin(&["cat"], Some((80, 24)), true);
    host.send(&Frame::Stdin(b"line\n".to_vec()));
    host.send(&Frame::Stdin(vec![]));
    assert_eq!(host.finish().last, exited(0));
}

#[test]
fn a_lost_connection_ends_the_command() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let script = format!("exec 3>{}; echo ready; sleep 60", fifo.display());
    let mut host = begin(&["sh", "-c", &script], None, false);
    let mut held = std::fs::File::open(&fifo).unwrap();
    host.wait_for("ready");
    drop(host);
    // The end of the file is the end of all who hold its other side: the shell and its child.
    assert_eq!(held.read(&mut [0]).unwrap(), 0);
}

#[test]
fn programs_that_cannot_be_started_are_126_and_127_with_a_reason() {
    let outcome = begin(&["no-such-program"], None, false).finish();
    assert_eq!(outcome.last, Frame::Exit(WorkloadExit::NotStarted(127)));
    assert!(String::from_utf8_lossy(&outcome.stderr).contains("no-such-program"));
    let outcome = begin(&["/etc/passwd"], None, false).finish();
    assert_eq!(outcome.last, Frame::Exit(WorkloadExit::NotStarted(126)));
}

#[test]
fn environment_and_directory_are_those_of_the_request() {
    let mut host = Host::of(&Executor::new(children()));
    let args =
        ["sh", "-c", "pwd; echo $HOME $COLOUR; grep SigBlk /proc/self/status"].map(String::from).to_vec();
    let env = [("COLOUR".to_owned(), "blue".to_owned())].into();
    let command = Command { args, env, cwd: "/tmp".into(), user: String::new() };
    host.send(&Frame::Start(ExecRequest { command, terminal: None, stdin: false }));
    let text = host.finish().text();
    assert!(text.starts_with("/tmp\n/root blue\n"), "{text}");
    assert!(text.ends_with("SigBlk:\t0000000000000000\n"), "{text}");
}

#[test]
fn requests_that_are_none_are_refused_with_a_reason() {
    let mut host = Host::of(&Executor::new(children()));
    host.send(&Frame::Stdin(vec![1]));
    assert!(matches!(host.finish().last, Frame::Refused(reason) if reason.contains("first frame")));

    let mut host = Host::of(&Executor::new(children()));
    host.0.write_all(&[1, 0, 0, 0, 3, 0, 0, 0, b'{', b'x', b'}']).unwrap();
    assert!(matches!(host.finish().last, Frame::Refused(reason) if reason.contains("well-formed")));

    let outcome = begin(&[], None, false).finish();
    assert!(matches!(outcome.last, Frame::Refused(reason) if reason.contains("program")));
}

#[test]
fn one_command_more_than_allowed_is_refused_and_there_is_room_again_later() {
    let executor = Executor::new(children());
    let waiting: Vec<Host> = (0..STREAMS_MAX).map(|_| Host::of(&executor)).collect();
    let mut more = Host::of(&executor);
    assert!(matches!(more.next(), Frame::Refused(reason) if reason.contains("256")));
    drop(waiting);
    loop {
        let mut host = Host::of(&executor);
        host.send(&request(&["true"], None, false));
        match host.finish().last {
            Frame::Refused(_) => executor.wait_for_room(Duration::from_millis(50)),
            last => return assert_eq!(last, exited(0)),
        }
    }
}

#[test]
fn an_executor_that_is_closed_refuses() {
    let executor = Executor::new(children());
    executor.close(LIMIT);
    let mut host = Host::of(&executor);
    assert!(matches!(host.next(), Frame::Refused(reason) if reason.contains("power off")));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn whatever_the_host_sends_first_gets_an_end(bytes in proptest::collection::vec(any::<u8>(), 1..200)) {
        let mut host = Host::of(&Executor::new(children()));
        host.0.write_all(&bytes).unwrap();
        host.0.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = vec![];
        // An end with or without a reset: bytes may have been left unread.
        let _reset = host.0.read_to_end(&mut rest);
    }
}
