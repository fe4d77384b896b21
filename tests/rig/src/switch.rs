//! A learning Ethernet switch between the hosts: each frame is one datagram on a unix socket.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Larger than any frame QEMU sends (64 KiB and headers).
const MAX_FRAME: usize = 70_000;
/// How long a host may be slow before its frames are dropped, as a real switch does when a port is full.
const PATIENCE: Duration = Duration::from_millis(20);
/// Stations remembered. Beyond it the table starts anew: frames are flooded, nothing is lost.
const MAX_STATIONS: usize = 4096;

/// What can go wrong when the switch starts.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its socket could not be made.
    #[error("cannot make the socket of the network switch")]
    Socket(#[source] io::Error),
    /// Its thread could not be started.
    #[error("cannot start the network switch")]
    Thread(#[source] io::Error),
}

type Mac = [u8; 6];

/// Where a frame goes.
#[derive(Debug, PartialEq, Eq)]
enum Route {
    /// To every port but the one it came from.
    Flood,
    /// To this port.
    Port(usize),
    /// Nowhere: too short to be a frame, or it is already where it belongs.
    Drop,
}

#[derive(Default)]
struct Table(HashMap<Mac, usize>);

impl Table {
    /// Learns where the sender is and says where the frame goes.
    fn route(&mut self, frame: &[u8], from: usize) -> Route {
        let Some((to, rest)) = frame.split_first_chunk::<6>() else { return Route::Drop };
        let Some((sender, _)) = rest.split_first_chunk::<6>() else { return Route::Drop };
        // The lowest bit of the first byte marks a group; a group never sends.
        if sender.first().is_some_and(|byte| byte & 1 == 0) {
            if self.0.len() >= MAX_STATIONS && !self.0.contains_key(sender) {
                self.0.clear();
            }
            self.0.insert(*sender, from);
        }
        match self.0.get(to) {
            Some(port) if *port == from => Route::Drop,
            Some(port) => Route::Port(*port),
            None => Route::Flood,
        }
    }
}

/// Starts a switch that listens at `path` and serves these ports until the process ends.
pub fn start(path: &Path, ports: Vec<PathBuf>) -> Result<(), Error> {
    let socket = UnixDatagram::bind(path).map_err(Error::Socket)?;
    socket.set_write_timeout(Some(PATIENCE)).map_err(Error::Socket)?;
    let work = move || forward(&socket, &ports);
    std::thread::Builder::new().name("switch".into()).spawn(work).map_err(Error::Thread)?;
    Ok(())
}

fn forward(socket: &UnixDatagram, ports: &[PathBuf]) {
    let mut table = Table::default();
    let mut buffer = vec![0; MAX_FRAME];
    loop {
        let Ok((length, sender)) = socket.recv_from(&mut buffer) else { return };
        let Some(from) = ports.iter().position(|port| Some(port.as_path()) == sender.as_pathname()) else {
            continue;
        };
        let frame = buffer.get(..length).unwrap_or_default();
        // Ethernet may lose frames: a host that is down or too slow misses them.
        match table.route(frame, from) {
            Route::Drop => {}
            Route::Port(port) => _ = ports.get(port).map(|port| socket.send_to(frame, port)),
            Route::Flood => {
                for (_, port) in ports.iter().enumerate().filter(|(number, _)| *number != from) {
                    _ = socket.send_to(frame, port);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: Mac = [0x52, 0x54, 0, 0x77, 0, 1];
    const B: Mac = [0x52, 0x54, 0, 0x77, 0, 2];
    const ALL: Mac = [0xff; 6];

    fn frame(to: Mac, from: Mac) -> Vec<u8> {
        [&to[..], &from[..], b"\x08\x06payload"].concat()
    }

    #[test]
    fn unknown_stations_are_flooded_and_known_ones_are_not() {
        let mut table = Table::default();
        assert_eq!(table.route(&frame(B, A), 0), Route::Flood);
        assert_eq!(table.route(&frame(A, B), 1), Route::Port(0));
        assert_eq!(table.route(&frame(B, A), 0), Route::Port(1));
        assert_eq!(table.route(&frame(ALL, A), 0), Route::Flood);
    }

    #[test]
    fn a_station_that_moves_is_followed() {
        let mut table = Table::default();
        table.route(&frame(ALL, A), 0);
        table.route(&frame(ALL, A), 2);
        assert_eq!(table.route(&frame(A, B), 1), Route::Port(2));
    }

    #[test]
    fn frames_between_two_stations_on_one_port_stay_there() {
        let mut table = Table::default();
        table.route(&frame(ALL, A), 0);
        assert_eq!(table.route(&frame(A, B), 0), Route::Drop);
    }

    #[test]
    fn a_group_is_never_learned_as_a_sender() {
        let mut table = Table::default();
        table.route(&frame(A, ALL), 0);
        assert_eq!(table.route(&frame(ALL, A), 1), Route::Flood);
    }

    #[test]
    fn the_table_stays_bounded() {
        let mut table = Table::default();
        for n in 0..10_000_u32 {
            let [a, b, c, d] = n.to_be_bytes();
            table.route(&frame(ALL, [2, 0, a, b, c, d]), 0);
        }
        assert!(table.0.len() <= MAX_STATIONS);
    }

    proptest! {
        #[test]
        fn no_frame_goes_back_to_where_it_came_from(
            frames in proptest::collection::vec((proptest::collection::vec(0_u8..4, 0..20), 0_usize..3), 0..50)
        ) {
            let mut table = Table::default();
            for (bytes, from) in frames {
                prop_assert_ne!(table.route(&bytes, from), Route::Port(from));
            }
        }
    }

    #[test]
    fn frames_cross_between_real_sockets() {
        let folder = tempfile::tempdir().unwrap();
        let ports: Vec<_> = (0..3).map(|n| folder.path().join(format!("port{n}"))).collect();
        let hosts: Vec<_> = ports.iter().map(|p| UnixDatagram::bind(p).unwrap()).collect();
        let middle = folder.path().join("switch");
        start(&middle, ports).unwrap();
        let mut buffer = [0; 64];
        hosts[0].send_to(&frame(ALL, A), &middle).unwrap();
        for host in &hosts[1..] {
            assert_eq!(host.recv(&mut buffer).unwrap(), frame(ALL, A).len());
        }
        hosts[1].send_to(&frame(A, B), &middle).unwrap();
        hosts[0].recv(&mut buffer).unwrap();
        assert_eq!(buffer[..12], frame(A, B)[..12]);
    }
}
