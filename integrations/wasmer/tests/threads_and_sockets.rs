//! Other state across a resume: further threads, and sockets.

// Helpers of a test may panic, as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use common::{Guest, Life, Vault};
use stillframe_wasmer::Resume;

#[test]
fn threads_go_on_where_they_were() {
    let (vault, guest) = (Vault::new(), Guest::build("threads").unwrap());
    let mut life = Life::start(&guest, vault.journal("threads", Resume::Latest), &[]).unwrap();
    for round in 1..=5 {
        assert_eq!(life.snapshot("s").unwrap(), format!("{round} {round} {round}"));
    }
    life.end().unwrap();
    let taken = vault.snapshots("threads");
    assert_eq!(taken.len(), 5);
    for (at, round) in [(4, 5), (1, 2)] {
        let mut life = Life::start(&guest, vault.journal("branch", Resume::At(taken[at])), &[]).unwrap();
        assert_eq!(life.line().unwrap(), format!("{round} {round} {round}"));
        for round in round + 1..round + 3 {
            assert_eq!(life.snapshot("s").unwrap(), format!("{round} {round} {round}"));
        }
        life.end().unwrap();
    }
}

/// A port of this machine that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

fn echo(life: &mut Life, stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).unwrap();
    assert_eq!(life.ask("echo").unwrap(), format!("{} 0", text.len()));
    let mut found = vec![0; text.len()];
    stream.read_exact(&mut found).unwrap();
    assert_eq!(found, text.as_bytes());
}

#[test]
fn a_guest_listens_again_after_a_resume_and_its_connections_are_dead() {
    let (vault, guest) = (Vault::new(), Guest::build("sockets").unwrap());
    let mut life = Life::start(&guest, vault.journal("sockets", Resume::Latest), &[]).unwrap();
    let mut port = free_port();
    // Another program may have taken the port in between.
    while life.ask(&format!("listen {port}")).unwrap() != "0" {
        port = free_port();
    }
    let mut stream = connect(port);
    assert_eq!(life.ask("accept").unwrap(), "0");
    echo(&mut life, &mut stream, "hello");
    assert_eq!(life.snapshot("s").unwrap(), "0");
    echo(&mut life, &mut stream, "still here");
    drop(stream);
    life.end().unwrap();

    let mut life = Life::start(&guest, vault.journal("sockets", Resume::Latest), &[]).unwrap();
    assert_eq!(life.line().unwrap(), "0");
    // The old connection is closed, and the guest gets an error for it.
    let said = life.ask("echo").unwrap();
    println!("a connection of the former life: {said}");
    assert!(said.starts_with("0 "), "{said}");
    // The guest accepts new connections.
    let mut stream = connect(port);
    assert_eq!(life.ask("accept").unwrap(), "0");
    echo(&mut life, &mut stream, "hello again");
    life.end().unwrap();
}
