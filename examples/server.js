// A web server with all its state in memory: each request adds a visit to a list.
const visits = [];
const server = require('http').createServer((request, response) => {
  visits.push(request.url);
  response.end(`visit ${visits.length}: ${visits.join(' ')}\n`);
});
server.listen(8080, '127.0.0.1', () => console.log(`process ${process.pid} listens on port 8080`));
