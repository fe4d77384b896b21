//! A guest program that echoes, and what comes back: credit in both directions and the bytes themselves.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::vsock_packet::{Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::vsock_test::{GUEST_BUFFER, Guest, data, shutdown};

/// A guest program that echoes what it gets, keeps to the credit it has and checks the credit it gave.
struct Echo {
    header: Header,
    waiting: VecDeque<u8>,
    /// Bytes it got, took out of its buffer, sent; the device's promise.
    got: u32,
    forwarded: u32,
    sent: u32,
    host_buffer: u32,
    host_forwarded: u32,
    input_ended: bool,
    told_end: bool,
    reset: bool,
    told: u32,
}

impl Echo {
    fn new(header: Header) -> Self {
        Self {
            header,
            waiting: VecDeque::new(),
            got: 0,
            forwarded: 0,
            sent: 0,
            host_buffer: 0,
            host_forwarded: 0,
            input_ended: false,
            told_end: false,
            reset: false,
            told: 0,
        }
    }

    fn on_packet(&mut self, header: &Header, payload: &[u8]) {
        self.host_buffer = header.buffer_size;
        self.host_forwarded = header.forwarded;
        assert!(header.forwarded <= self.sent, "told of bytes that were never sent");
        match header.operation {
            Operation::Data => {
                assert!(!self.input_ended, "data behind the end");
                self.got += payload.len() as u32;
                assert!(self.got - self.told <= GUEST_BUFFER, "more than the guest has room for");
                self.waiting.extend(payload);
            }
            Operation::Shutdown => self.input_ended |= header.flags & SHUTDOWN_SEND != 0,
            Operation::Reset => self.reset = true,
            Operation::CreditUpdate | Operation::CreditRequest => {}
            other => panic!("{other:?}"),
        }
    }

    /// Sends at most `most` bytes.
    fn step(&mut self, guest: &mut Guest, most: usize) {
        let credit = self.host_buffer - (self.sent - self.host_forwarded);
        let count = self.waiting.len().min(most).min(credit as usize);
        if count > 0 {
            let bytes: Vec<u8> = self.waiting.drain(..count).collect();
            self.sent += count as u32;
            self.forwarded += count as u32;
            self.told = self.forwarded;
            guest.send(Header { forwarded: self.forwarded, ..data(&self.header, &bytes) }, &bytes);
        } else if self.input_ended && self.waiting.is_empty() && !self.told_end {
            self.told_end = true;
            let flags = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
            guest.send(Header { forwarded: self.forwarded, ..shutdown(&self.header, flags) }, &[]);
        }
    }
}

/// Sends `input` from a client through an echo in the guest; what came back.
fn echo(input: &[u8], chunk: usize, most: usize, offers: usize) -> Vec<u8> {
    let mut guest = Guest::new();
    let (client, header) = guest.stream(1);
    let mut reader = client.try_clone().unwrap();
    let mut writer = client;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for part in input.chunks(chunk) {
                writer.write_all(part).unwrap();
            }
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let output = scope.spawn(move || {
            let mut all = vec![];
            let mut part = vec![0; chunk];
            loop {
                match reader.read(&mut part).unwrap() {
                    0 => return all,
                    count => all.extend_from_slice(&part[..count]),
                }
            }
        });
        let mut program = Echo::new(header);
        let end = Instant::now() + Duration::from_secs(60);
        while !program.reset {
            assert!(Instant::now() < end, "{} of {} bytes", program.sent, input.len());
            guest.take_in();
            while let Some((header, payload)) = guest.inbox.pop_front() {
                program.on_packet(&header, &payload);
            }
            program.step(&mut guest, most);
            guest.offer(offers);
            guest.machine.events.turn(&mut guest.machine.device, Duration::from_millis(1));
        }
        output.join().unwrap()
    })
}

#[test]
fn a_mebibyte_comes_back_intact_under_back_pressure() {
    let input: Vec<u8> = (0..1u32 << 20).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect();
    assert!(echo(&input, 50_000, 40_000, 8) == input);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Both sides keep to their credit whatever the sizes are, and the bytes stay the bytes.
    #[test]
    fn an_echo_of_any_shape_is_intact(
        length in 0usize..200_000, chunk in 1usize..30_000, most in 1usize..70_000, offers in 1usize..32,
    ) {
        let most = most.max(length / 300);
        let chunk = chunk.max(length / 300);
        let input: Vec<u8> = (0..length).map(|i| (i ^ (i >> 8)) as u8).collect();
        prop_assert!(echo(&input, chunk, most, offers) == input);
    }
}
