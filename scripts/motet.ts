// The command line of Motet: `motet bench` loads a server and reports.

const usage = `Usage: motet COMMAND [option ...]

  bench    load an OpenAI-compatible server, or one that it starts, and report throughput and latencies

motet COMMAND --help lists the options of a command.
`;

const [command, ...args] = process.argv.slice(2);
if (command === 'bench') {
  const { bench } = await import('../tests/bench/load/main.ts');
  process.exitCode = await bench(args);
} else if (command === '--help') {
  process.stdout.write(usage);
} else {
  process.stderr.write(command === undefined ? usage : `motet: unknown command ${command}\n\n${usage}`);
  process.exitCode = 2;
}
