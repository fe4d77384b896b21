//! The pump against a guest at the other end of a pipe in memory.

use tokio::io::{DuplexStream, duplex};

use blixard_vmm_api::guest::Command;

use super::*;

const NO_INPUT: Option<&[u8]> = None;

fn request(stdin: bool) -> ExecRequest {
    ExecRequest { command: Command { args: vec!["x".into()], ..Command::default() }, terminal: None, stdin }
}

async fn next(guest: &mut DuplexStream) -> Frame {
    let mut header = [0; frame::HEADER];
    guest.read_exact(&mut header).await.unwrap();
    let (kind, length) = frame::decode_header(header).unwrap();
    let mut payload = vec![0; length];
    guest.read_exact(&mut payload).await.unwrap();
    Frame::decode(kind, payload, |t| serde_json::from_slice(t).ok()).unwrap()
}

async fn say(guest: &mut DuplexStream, frame: Frame) {
    guest.write_all(&frame.encode(|_| None).unwrap()).await.unwrap();
}

fn no_events() -> mpsc::Receiver<Frame> {
    mpsc::channel(1).1
}

#[tokio::test]
async fn a_mebibyte_of_input_arrives_in_order_and_comes_back_through_a_narrow_pipe() {
    let input: Vec<u8> = (0..1u32 << 18).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let (host, mut guest) = duplex(1000);
    let echo = async {
        assert_eq!(next(&mut guest).await, Frame::Start(request(true)));
        loop {
            match next(&mut guest).await {
                Frame::Stdin(bytes) if bytes.is_empty() => break,
                Frame::Stdin(bytes) => say(&mut guest, Frame::Stdout(bytes)).await,
                other => panic!("{other:?}"),
            }
        }
        say(&mut guest, Frame::Stderr(b"done".to_vec())).await;
        say(&mut guest, Frame::Exit(WorkloadExit::Code(7))).await;
    };
    let (mut out, mut err) = (vec![], vec![]);
    let run = pump(host, request(true), Some(input.as_slice()), no_events(), &mut out, &mut err);
    let (result, ()) = tokio::join!(run, echo);
    assert_eq!(result.unwrap(), WorkloadExit::Code(7));
    assert!(out == input && err == b"done");
}

#[tokio::test]
async fn sizes_and_signals_reach_the_guest_while_input_is_silent() {
    let (host, mut guest) = duplex(1000);
    let (send, events) = mpsc::channel(4);
    let (silent, _kept) = duplex(1);
    let script = async {
        next(&mut guest).await;
        send.send(Frame::Resize(100, 40)).await.unwrap();
        assert_eq!(next(&mut guest).await, Frame::Resize(100, 40));
        send.send(Frame::Signal(2)).await.unwrap();
        assert_eq!(next(&mut guest).await, Frame::Signal(2));
        say(&mut guest, Frame::Exit(WorkloadExit::Signal(2))).await;
    };
    let run = pump(host, request(true), Some(silent), events, vec![], vec![]);
    let (result, ()) = tokio::join!(run, script);
    assert_eq!(result.unwrap().shell_code(), 130);
}

#[tokio::test]
async fn a_command_that_ends_before_it_has_read_its_input_still_tells_its_exit() {
    let (host, mut guest) = duplex(1000);
    let script = async {
        next(&mut guest).await;
        say(&mut guest, Frame::Exit(WorkloadExit::NotStarted(127))).await;
        // The pipe is full: the rest of the input is never taken.
        guest
    };
    let endless = tokio::io::repeat(7);
    let run = pump(host, request(true), Some(endless), no_events(), vec![], vec![]);
    let (result, _guest) = tokio::join!(run, script);
    assert_eq!(result.unwrap().shell_code(), 127);
}

#[tokio::test]
async fn a_refusal_a_lost_connection_and_nonsense_are_told_apart() {
    let run = async |bytes: Vec<u8>| {
        let (host, mut guest) = duplex(4096);
        guest.write_all(&bytes).await.unwrap();
        drop(guest);
        pump(host, request(false), NO_INPUT, no_events(), vec![], vec![]).await.unwrap_err()
    };
    let refused = Frame::Refused("busy".into()).encode(|_| None).unwrap();
    assert_eq!(run(refused).await.to_string(), "the VM refused: busy");
    let half = Frame::Stdout(vec![1; 100]).encode(|_| None).unwrap()[..50].to_vec();
    assert!(matches!(run(half).await, PumpError::Lost(_)));
    assert!(matches!(run(vec![16, 0, 0, 0, 255, 255, 255, 255]).await, PumpError::Frame(_)));
    assert!(matches!(run(vec![99, 0, 0, 0, 0, 0, 0, 0]).await, PumpError::Frame(_)));
    let backwards = Frame::Signal(9).encode(|_| None).unwrap();
    assert!(matches!(run(backwards).await, PumpError::Frame(_)), "what only hosts say");
}
