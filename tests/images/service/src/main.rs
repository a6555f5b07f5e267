//! Says hello, which its private crates know how to do. Built by the same Dockerfiles as warmdock, unchanged.

fn main() -> std::process::ExitCode {
    match std::env::args().nth(1).as_deref() {
        None => println!("{}, {}", greeting::hello(), itoa::Buffer::new().format(tally::count())),
        Some("healthcheck") => {}
        Some(other) => {
            eprintln!("unknown command {other:?}: expected none, or healthcheck");
            return 64.into();
        }
    }
    0.into()
}
